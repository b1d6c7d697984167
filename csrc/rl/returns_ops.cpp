// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of macro_pool, macro_gae, gae, ma_ppo_prepare and macro_segment_check.
#include "rl/returns_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {
namespace {

PoolBy to_pool(const char* op, const char* arg, const std::string& name) {
  if (name == "sum") return PoolBy::sum;
  if (name == "equal") return PoolBy::equal;
  if (name == "unit") return PoolBy::unit;
  if (name == "position") return PoolBy::position;
  TENFOLD_CHECK_VALUE(name == "position_early", "tenfold::", op, ": ", arg,
                      " must be one of sum, equal, unit, position, position_early, got '", name,
                      "'");
  return PoolBy::position_early;
}

void check_count(const char* op, int64_t count) {
  TENFOLD_CHECK_VALUE(count >= 0 && count <= INT32_MAX, "tenfold::", op,
                      ": T must be in [0, 2^31), got ", count);
}

void check_unit_interval(const char* op, const char* arg, double value) {
  TENFOLD_CHECK_VALUE(value >= 0.0 && value <= 1.0, "tenfold::", op, ": ", arg,
                      " must be in [0, 1], got ", value);
}

OptTensor check_bootstrap(const char* op, const OptTensor& t, const Tensor& like, int64_t rows) {
  return t ? OptTensor(check_vector(op, "bootstrap", *t, like, rows)) : OptTensor();
}

GaeCall gae_call(const char* op, const Layout& layout, const Tensor& value, const Tensor& reward,
                 const GaeRule& rule, const OptTensor& bootstrap, const char* const names[2],
                 const Tensor& like) {
  const Tensor v = check_rows(op, names[0], value, like),
               r = check_rows(op, names[1], reward, like);
  check_same_dtype(op, names[1], r, names[0], v);
  check_unit_interval(op, "gamma", rule.gamma);
  check_unit_interval(op, "lam", rule.lam);
  return {layout,
          std::nullopt,
          std::nullopt,
          v,
          r,
          std::nullopt,
          check_bootstrap(op, bootstrap, v, layout.rows.count),
          rule,
          new_tokens(v, layout, v.scalar_type()),
          new_tokens(v, layout, v.scalar_type())};
}

}  // namespace

PoolCall check_pool(const Tensor& x_in, const Tensor& seg_in, int64_t count,
                    const std::string& weight, const OptTensor& cu_seqlens) {
  constexpr auto kOp = "macro_pool";
  const Segments seg = check_seg(kOp, seg_in, cu_seqlens);
  const Tensor x = check_rows(kOp, "x", x_in, seg.seg);
  check_count(kOp, count);
  return {seg, count, to_pool(kOp, "weight", weight), x,
          new_output(x, {seg.layout.rows.count, count}, x.scalar_type())};
}

PoolCall check_pool_backward(const Tensor& grad, const Tensor& seg_in, int64_t count,
                             const std::string& weight, const OptTensor& cu_seqlens) {
  constexpr auto kOp = "macro_pool_backward";
  const Segments seg = check_seg(kOp, seg_in, cu_seqlens);
  check_count(kOp, count);
  const int64_t rows = seg.layout.rows.count;
  TENFOLD_CHECK_VALUE(grad.dim() == 2 && grad.sizes()[0] == rows && grad.sizes()[1] == count,
                      "tenfold::", kOp, ": grad must be [", rows, ", ", count, "], got ",
                      shape_str(grad));
  check_same_device(kOp, "grad", grad, "seg", seg.seg);
  const Tensor from = check_rows(kOp, "grad", grad, grad);
  return {seg, count, to_pool(kOp, "weight", weight), from,
          new_tokens(from, seg.layout, from.scalar_type())};
}

GaeCall check_macro_gae(const Tensor& value, const Tensor& reward, const Tensor& nseg,
                        const OptTensor& length, double gamma, double lam,
                        const OptTensor& bootstrap) {
  constexpr auto kOp = "macro_gae";
  constexpr const char* kNames[] = {"value_m", "reward_m"};
  check_dim(kOp, "value_m", value, 2, "[B, T]");
  const Layout layout = check_layout(kOp, "value_m", value, std::nullopt);
  GaeCall call = gae_call(kOp, layout, value, reward, {gamma, lam, length.has_value()}, bootstrap,
                          kNames, value);
  call.nseg = check_nseg(kOp, nseg, value, layout.rows.count);
  if (length) {
    TENFOLD_CHECK_TYPE(length->scalar_type() == ScalarType::Int, "tenfold::", kOp,
                       ": length must be int32, got ", dtype_name(length->scalar_type()));
    TENFOLD_CHECK_VALUE(same_sizes(*length, value), "tenfold::", kOp, ": length must be ",
                        shape_str(value), ", got ", shape_str(*length));
    check_same_device(kOp, "length", *length, "value_m", value);
    call.length = as_contiguous(*length);
  }
  return call;
}

GaeCall check_gae(const Tensor& value, const Tensor& reward, const Tensor& mask, double gamma,
                  double lam, const OptTensor& bootstrap, const OptTensor& cu_seqlens) {
  constexpr auto kOp = "gae";
  constexpr const char* kNames[] = {"value", "reward"};
  check_bytes(kOp, "mask", mask);
  const Layout layout = check_layout(kOp, "mask", mask, cu_seqlens);
  GaeCall call = gae_call(kOp, layout, value, reward, {gamma, lam, false}, bootstrap, kNames, mask);
  call.mask = as_contiguous(mask);
  return call;
}

PrepareRule to_prepare_rule(double beta, double gamma, double lam, double score_clip,
                            const std::string& sigma, const std::string& reward_reduce,
                            const std::string& discount, const std::string& kl) {
  constexpr auto kOp = "ma_ppo_prepare";
  TENFOLD_CHECK_VALUE(beta >= 0.0, "tenfold::", kOp, ": beta must be at least 0, got ", beta);
  check_unit_interval(kOp, "gamma", gamma);
  check_unit_interval(kOp, "lam", lam);
  TENFOLD_CHECK_VALUE(score_clip > 0.0, "tenfold::", kOp, ": score_clip must be above 0, got ",
                      score_clip);
  TENFOLD_CHECK_VALUE(reward_reduce == "sum" || reward_reduce == "sigma", "tenfold::", kOp,
                      ": reward_reduce must be sum or sigma, got '", reward_reduce, "'");
  TENFOLD_CHECK_VALUE(discount == "per_macro" || discount == "per_token", "tenfold::", kOp,
                      ": discount must be per_macro or per_token, got '", discount, "'");
  TENFOLD_CHECK_VALUE(kl == "k1" || kl == "k2" || kl == "k3", "tenfold::", kOp,
                      ": kl must be k1, k2 or k3, got '", kl, "'");
  return {beta,
          score_clip,
          to_pool(kOp, "sigma", sigma),
          reward_reduce == "sigma",
          kl == "k1"   ? KlBy::k1
          : kl == "k2" ? KlBy::k2
                       : KlBy::k3,
          {gamma, lam, discount == "per_token"}};
}

PrepareCall check_prepare(const Tensor& logp_old, const Tensor& logp_ref, const Tensor& value_old,
                          const Tensor& score, const Tensor& seg_in, const Tensor& nseg,
                          const PrepareRule& rule, const OptTensor& bootstrap,
                          const OptTensor& cu_seqlens) {
  constexpr auto kOp = "ma_ppo_prepare";
  const Segments seg = check_seg(kOp, seg_in, cu_seqlens);
  const int64_t rows = seg.layout.rows.count;
  const Tensor old = check_rows(kOp, "logp_old", logp_old, seg.seg);
  const Tensor ref = check_rows(kOp, "logp_ref", logp_ref, seg.seg);
  const Tensor value = check_rows(kOp, "value_old", value_old, seg.seg);
  check_same_dtype(kOp, "logp_ref", ref, "logp_old", old);
  check_same_dtype(kOp, "value_old", value, "logp_old", old);
  const auto make = [&] { return new_tokens(old, seg.layout, old.scalar_type()); };
  return {seg,
          check_nseg(kOp, nseg, seg.seg, rows),
          old,
          ref,
          value,
          check_vector(kOp, "score", score, old, rows),
          check_bootstrap(kOp, bootstrap, old, rows),
          rule,
          make(),
          make(),
          make(),
          make(),
          new_output(old, {rows}, old.scalar_type())};
}

CheckCall check_segment_check(const Tensor& seg_in, const OptTensor& nseg, int64_t limit,
                              const OptTensor& cu_seqlens) {
  constexpr auto kOp = "macro_segment_check";
  CheckCall call{check_seg(kOp, seg_in, cu_seqlens), nseg, seg_in, {}};
  const int64_t rows = call.seg.layout.rows.count;
  if (nseg) call.nseg = check_nseg(kOp, *nseg, call.seg.seg, rows);
  call.wrong = new_output(call.seg.seg, {rows}, ScalarType::Bool);
  call.p = {call.seg.layout.rows, as_ints(call.seg.seg), call.nseg ? as_ints(*call.nseg) : Ints{},
            limit, static_cast<uint8_t*>(call.wrong.data_ptr())};
  return call;
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "macro_pool(Tensor x, Tensor seg, int T, str weight=\"equal\", *, Tensor? cu_seqlens=None) "
      "-> Tensor");
  m.def(
      "macro_pool_backward(Tensor grad, Tensor seg, int T, str weight=\"equal\", *, "
      "Tensor? cu_seqlens=None) -> Tensor");
  m.def(
      "macro_gae(Tensor value_m, Tensor reward_m, Tensor nseg, Tensor? length=None, "
      "float gamma=1.0, float lam=0.95, Tensor? bootstrap=None) -> (Tensor adv_m, Tensor ret_m)");
  m.def(
      "gae(Tensor value, Tensor reward, Tensor mask, float gamma=1.0, float lam=0.95, "
      "Tensor? bootstrap=None, *, Tensor? cu_seqlens=None) -> (Tensor adv, Tensor ret)");
  m.def(
      "ma_ppo_prepare(Tensor logp_old, Tensor logp_ref, Tensor value_old, Tensor score, "
      "Tensor seg, Tensor nseg, float beta=0.05, float gamma=1.0, float lam=0.95, "
      "float score_clip=2.5, str sigma=\"equal\", str reward_reduce=\"sum\", "
      "str discount=\"per_macro\", str kl=\"k1\", Tensor? bootstrap=None, *, "
      "Tensor? cu_seqlens=None) "
      "-> (Tensor adv, Tensor ret, Tensor adv_m, Tensor ret_m, Tensor kl_row)");
  // wrong [B]: rows of seg whose macro actions are not 0, 1, ... in order, each with a token, nseg
  // of them and at most `limit`.
  m.def(
      "macro_segment_check(Tensor seg, Tensor? nseg, int limit, *, Tensor? cu_seqlens=None) "
      "-> Tensor");
}
