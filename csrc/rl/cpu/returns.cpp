// CPU registration of macro_pool (with backward), macro_gae and ma_ppo_prepare: a row per task.
#include "rl/returns.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "rl/cpu/rows.h"
#include "rl/returns_ops.h"

namespace tenfold::cpu {
namespace {

void check_count(const char* op, int64_t count) {
  TENFOLD_CHECK_VALUE(count >= 0 && count <= INT32_MAX, "tenfold::", op,
                      ": T must be in [0, 2^31), got ", count);
}

Tensor macro_pool_op(Tensor x_in, Tensor seg_in, int64_t count, std::string weight) {
  constexpr auto kOp = "macro_pool";
  const Tensor seg = check_seg(kOp, seg_in), x = check_rows(kOp, "x", x_in, seg);
  check_count(kOp, count);
  const PoolBy by = to_pool(kOp, "weight", weight);
  const Tensor out = new_output(x, {seg.sizes()[0], count}, x.scalar_type());
  with_real(x, [&]<class T>() {
    over_rows(seg, count, [&](int64_t b, const Row& row) {
      std::vector<double> sum(count);
      const T* from = data_as<T>(x) + b * row.width();
      for (int64_t j = 0; j < row.width(); ++j)
        if (row.segment(j) >= 0)
          sum[row.segment(j)] += row.weight(by, j) * static_cast<double>(from[j]);
      T* to = data_as<T>(out) + b * count;
      for (int64_t t = 0; t < count; ++t) to[t] = static_cast<T>(sum[t]);
    });
  });
  return out;
}

Tensor macro_pool_backward_op(Tensor grad_in, Tensor seg_in, int64_t count, std::string weight) {
  constexpr auto kOp = "macro_pool_backward";
  const Tensor seg = check_seg(kOp, seg_in);
  check_count(kOp, count);
  const PoolBy by = to_pool(kOp, "weight", weight);
  const Tensor like = new_output(seg, {seg.sizes()[0], count}, ScalarType::Byte);
  const Tensor grad = check_rows(kOp, "grad", grad_in, like);
  const Tensor out = new_output(grad, {seg.sizes()[0], seg.sizes()[1]}, grad.scalar_type());
  with_real(grad, [&]<class T>() {
    over_rows(seg, count, [&](int64_t b, const Row& row) {
      const T* from = data_as<T>(grad) + b * count;
      T* to = data_as<T>(out) + b * row.width();
      for (int64_t j = 0; j < row.width(); ++j)
        to[j] = row.segment(j) < 0 ? T{0}
                                   : static_cast<T>(row.weight(by, j) *
                                                    static_cast<double>(from[row.segment(j)]));
    });
  });
  return out;
}

int64_t count_at(const Tensor& nseg, int64_t b, int64_t most) {
  const int64_t n = nseg.scalar_type() == ScalarType::Int ? data_as<int32_t>(nseg)[b]
                                                          : data_as<int64_t>(nseg)[b];
  return std::clamp<int64_t>(n, 0, most);
}

Tensor check_nseg(const char* op, const Tensor& nseg, const Tensor& like) {
  check_int_dtype(op, "nseg", nseg);
  TENFOLD_CHECK_VALUE(nseg.dim() == 1 && nseg.sizes()[0] == like.sizes()[0], "tenfold::", op,
                      ": nseg must be [", like.sizes()[0], "], got ", shape_str(nseg));
  check_same_device(op, "nseg", nseg, "seg", like);
  return nseg.is_contiguous() ? nseg : torch::stable::contiguous(nseg);
}

std::tuple<Tensor, Tensor> macro_gae_op(Tensor value_in, Tensor reward_in, Tensor nseg_in,
                                        OptTensor length_in, double gamma, double lam,
                                        OptTensor bootstrap_in) {
  constexpr auto kOp = "macro_gae";
  check_dim(kOp, "value_m", value_in, 2, "[B, T]");
  const Tensor value = check_rows(kOp, "value_m", value_in, value_in);
  const Tensor reward = check_rows(kOp, "reward_m", reward_in, value);
  TENFOLD_CHECK_TYPE(reward.scalar_type() == value.scalar_type(),
                     "tenfold::macro_gae: reward_m must have the dtype of value_m, ",
                     dtype_name(value.scalar_type()), ", got ", dtype_name(reward.scalar_type()));
  const Tensor nseg = check_nseg(kOp, nseg_in, value);
  check_unit_interval(kOp, "gamma", gamma);
  check_unit_interval(kOp, "lam", lam);
  const int64_t rows = value.sizes()[0], count = value.sizes()[1];
  OptTensor length = length_in, bootstrap = bootstrap_in;
  if (length) {
    TENFOLD_CHECK_TYPE(length->scalar_type() == ScalarType::Int,
                       "tenfold::macro_gae: length must be int32, got ",
                       dtype_name(length->scalar_type()));
    TENFOLD_CHECK_VALUE(same_sizes(*length, value), "tenfold::macro_gae: length must be ",
                        shape_str(value), ", got ", shape_str(*length));
    if (!length->is_contiguous()) length = torch::stable::contiguous(*length);
  }
  if (bootstrap) bootstrap = check_vector(kOp, "bootstrap", *bootstrap, value);
  const Tensor adv = new_output(value, {rows, count}, value.scalar_type());
  const Tensor ret = new_output(value, {rows, count}, value.scalar_type());
  const GaeParams p{gamma, lam, length.has_value()};
  with_real(value, [&]<class T>() {
    parallel_for(rows, kMicrosPerToken * static_cast<double>(count + 1), [&](int64_t begin,
                                                                            int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * count, n = count_at(nseg, b, count);
        T *const a = data_as<T>(adv) + at, *const r = data_as<T>(ret) + at;
        std::copy_n(data_as<T>(reward) + at, n, a);
        std::copy_n(data_as<T>(value) + at, n, r);
        std::fill(a + n, a + count, T{0});
        std::fill(r + n, r + count, T{0});
        gae_row(p, n, bootstrap ? data_as<T>(*bootstrap)[b] : 0.0,
                length ? data_as<int32_t>(*length) + at : nullptr, a, r);
      }
    });
  });
  return {adv, ret};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ma_ppo_prepare_op(
    Tensor logp_old, Tensor logp_ref, Tensor value_old, Tensor score_in, Tensor seg_in,
    Tensor nseg_in, double beta, double gamma, double lam, double score_clip, std::string sigma,
    std::string reward_reduce, std::string discount, std::string kl, OptTensor bootstrap_in) {
  constexpr auto kOp = "ma_ppo_prepare";
  const PrepareArgs p =
      check_prepare(beta, gamma, lam, score_clip, sigma, reward_reduce, discount, kl);
  const Tensor seg = check_seg(kOp, seg_in), nseg = check_nseg(kOp, nseg_in, seg);
  const Tensor old = check_rows(kOp, "logp_old", logp_old, seg);
  const Tensor ref = check_rows(kOp, "logp_ref", logp_ref, seg);
  const Tensor value = check_rows(kOp, "value_old", value_old, seg);
  for (const Tensor* t : {&ref, &value})
    TENFOLD_CHECK_TYPE(t->scalar_type() == old.scalar_type(), "tenfold::", kOp,
                       ": logp_old, logp_ref and value_old must have one dtype, got ",
                       dtype_name(old.scalar_type()), " and ", dtype_name(t->scalar_type()));
  const Tensor score = check_vector(kOp, "score", score_in, old);
  const OptTensor bootstrap =
      bootstrap_in ? OptTensor(check_vector(kOp, "bootstrap", *bootstrap_in, old)) : OptTensor();
  const int64_t rows = seg.sizes()[0], width = seg.sizes()[1];
  const auto make = [&] { return new_output(old, {rows, width}, old.scalar_type()); };
  const Tensor adv = make(), ret = make(), adv_m = make(), ret_m = make();
  const Tensor kl_row = new_output(old, {rows}, old.scalar_type());
  with_real(old, [&]<class T>() {
    over_rows(seg, width, [&](int64_t b, const Row& row) {
      const int64_t at = b * width, n = count_at(nseg, b, width);
      const T *o = data_as<T>(old) + at, *f = data_as<T>(ref) + at, *v = data_as<T>(value) + at;
      std::vector<double> values(width), rewards(width);
      int64_t last = -1, tokens = 0;
      double kl_sum = 0.0;
      for (int64_t j = 0; j < width; ++j)
        if (row.segment(j) >= 0) last = j;
      const double clipped = std::clamp<double>(data_as<T>(score)[b], -p.score_clip, p.score_clip);
      for (int64_t j = 0; j < width; ++j) {
        const int32_t s = row.segment(j);
        if (s < 0) continue;
        const double k = kl_term(p.kl, static_cast<double>(o[j]) - static_cast<double>(f[j]));
        const double w = row.weight(p.sigma, j);
        double r = -p.beta * k;
        kl_sum += k, ++tokens;
        if (p.reduce_sigma) {
          r = w * (j == last ? r + clipped : r);
        } else if (p.gae.per_token) {
          r *= std::pow(p.gamma, static_cast<double>(row.place(j)));
        }
        rewards[s] += r;
        values[s] += w * static_cast<double>(v[j]);
      }
      if (!p.reduce_sigma && n > 0) rewards[n - 1] += clipped;
      T *const a = data_as<T>(adv_m) + at, *const r = data_as<T>(ret_m) + at;
      for (int64_t t = 0; t < width; ++t) {
        a[t] = t < n ? static_cast<T>(rewards[t]) : T{0};
        r[t] = t < n ? static_cast<T>(values[t]) : T{0};
      }
      gae_row(p.gae, n, bootstrap ? data_as<T>(*bootstrap)[b] : 0.0, row.lengths(), a, r);
      T *const ta = data_as<T>(adv) + at, *const tr = data_as<T>(ret) + at;
      for (int64_t j = 0; j < width; ++j) {
        const int32_t s = row.segment(j);
        ta[j] = s < 0 ? T{0} : a[s];
        tr[j] = s < 0 ? T{0} : r[s];
      }
      data_as<T>(kl_row)[b] = static_cast<T>(tokens > 0 ? kl_sum / static_cast<double>(tokens) : 0);
    });
  });
  return {adv, ret, adv_m, ret_m, kl_row};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("macro_pool", TORCH_BOX(&tenfold::cpu::macro_pool_op));
  m.impl("macro_pool_backward", TORCH_BOX(&tenfold::cpu::macro_pool_backward_op));
  m.impl("macro_gae", TORCH_BOX(&tenfold::cpu::macro_gae_op));
  m.impl("ma_ppo_prepare", TORCH_BOX(&tenfold::cpu::ma_ppo_prepare_op));
}
