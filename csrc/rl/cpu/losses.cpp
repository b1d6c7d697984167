// CPU registration of PPO's losses. Rows are summed in double, and the rows' sums in order: results
// do not depend on threads.
#include "rl/losses.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "rl/cpu/rows.h"
#include "rl/losses_ops.h"
#include "rl/returns_ops.h"

namespace tenfold::cpu {
namespace {

// Sums of one row.
struct Sums {
  double loss = 0.0, weight = 0.0, log_ratio = 0.0, ratio = 0.0;
  double most = 0.0, high = 0.0, low = 0.0, terms = 0.0, tokens = 0.0;
};

// What the weighted sum of a row's terms is multiplied by, and how the rows add up.
class Mean {
 public:
  Mean(AggregateBy agg, double denom, const std::vector<Sums>& rows) : agg_(agg) {
    double weight = 0.0, filled = 0.0;
    for (const Sums& r : rows) weight += r.weight, filled += r.weight > 0.0;
    const double count = agg == AggregateBy::token_mean ? weight : filled;
    by_ = denom > 0.0 ? denom : std::max(count, 1.0);
  }
  double scale(const Sums& row) const {
    if (agg_ == AggregateBy::token_mean) return 1.0 / by_;
    return row.weight > 0.0 ? 1.0 / (row.weight * by_) : 0.0;
  }

 private:
  AggregateBy agg_;
  double by_;
};

template <class T>
struct PolicyRow {
  const T *now, *old, *adv;

  double log_ratio(int64_t j) const {
    return static_cast<double>(now[j]) - static_cast<double>(old[j]);
  }
};

// The macro actions of a row: log-ratio and advantage of each.
struct Macro {
  std::vector<double> log_ratio, adv;

  template <class T>
  void read(const PolicyRule& p, const PolicyRow<T>& x, const Row& row) {
    log_ratio.assign(row.width(), 0.0), adv.assign(row.width(), 0.0);
    for (int64_t j = 0; j < row.width(); ++j) {
      const int32_t s = row.segment(j);
      if (s < 0) continue;
      const double mean = 1.0 / static_cast<double>(row.lengths()[s]);
      log_ratio[s] += x.log_ratio(j) * (p.ratio == RatioBy::geo_mean ? mean : 1.0);
      adv[s] += static_cast<double>(x.adv[j]) * mean;
    }
  }
};

void add(const PolicyTerm& t, double weight, Sums* s) {
  s->loss += t.loss * weight, s->weight += weight, s->ratio += t.ratio;
  s->most = std::max(s->most, t.ratio);
  s->high += t.clipped_high, s->low += t.clipped_low, s->terms += 1.0;
}

double weight_of(const PolicyRule& p, int32_t length) {
  return p.by_length ? static_cast<double>(length) : 1.0;
}

template <class T>
Sums policy_row(const PolicyRule& p, const PolicyRow<T>& x, const Row& row) {
  Sums sums;
  for (int64_t j = 0; j < row.width(); ++j) {
    if (row.segment(j) < 0) continue;
    sums.log_ratio += x.log_ratio(j), sums.tokens += 1.0;
    if (p.ratio == RatioBy::token)
      add(policy_term(p, x.log_ratio(j), static_cast<double>(x.adv[j])), 1.0, &sums);
  }
  if (p.ratio == RatioBy::token) return sums;
  Macro macro;
  macro.read(p, x, row);
  for (int64_t t = 0; t < row.width(); ++t)
    if (row.lengths()[t] > 0)
      add(policy_term(p, macro.log_ratio[t], macro.adv[t]), weight_of(p, row.lengths()[t]), &sums);
  return sums;
}

struct PolicyInputs {
  Tensor seg, now, old, adv;

  PolicyInputs(const char* op, const Tensor& logp_new, const Tensor& logp_old, const Tensor& adv_in,
               const Tensor& seg_in)
      : seg(check_seg(op, seg_in)),
        now(check_rows(op, "logp_new", logp_new, seg)),
        old(check_rows(op, "logp_old", logp_old, seg)),
        adv(check_rows(op, "adv", adv_in, seg)) {
    check_same_dtype(op, "logp_old", old, "logp_new", now);
    check_same_dtype(op, "adv", adv, "logp_new", now);
  }

  template <class T>
  PolicyRow<T> row(int64_t b) const {
    const int64_t at = b * seg.sizes()[1];
    return {data_as<T>(now) + at, data_as<T>(old) + at, data_as<T>(adv) + at};
  }

  template <class T>
  std::vector<Sums> sums(const PolicyRule& p) const {
    std::vector<Sums> made(seg.sizes()[0]);
    over_rows(seg, seg.sizes()[1],
              [&](int64_t b, const Row& r) { made[b] = policy_row(p, row<T>(b), r); });
    return made;
  }
};

template <class T>
void write_scalar(const Tensor& t, double x) {
  *data_as<T>(t) = static_cast<T>(x);
}

std::tuple<Tensor, Tensor> policy_loss_op(Tensor logp_new, Tensor logp_old, Tensor adv, Tensor seg,
                                          double eps_lo, double eps_hi, std::string ratio,
                                          std::string agg, double denom, std::string weight) {
  constexpr auto kOp = "ma_ppo_policy_loss";
  const PolicyRule p = check_policy(kOp, eps_lo, eps_hi, ratio, agg, denom, weight);
  const PolicyInputs in(kOp, logp_new, logp_old, adv, seg);
  const Tensor loss = new_output(in.now, {}, in.now.scalar_type());
  const Tensor stats = new_output(in.now, {kPolicyStats}, ScalarType::Float);
  with_real(in.now, [&]<class T>() {
    const std::vector<Sums> rows = in.sums<T>(p);
    const Mean mean(p.agg, p.denom, rows);
    Sums all;
    double total = 0.0;
    for (const Sums& r : rows) {
      total += r.loss * mean.scale(r);
      all.high += r.high, all.low += r.low, all.ratio += r.ratio, all.terms += r.terms;
      all.log_ratio += r.log_ratio, all.tokens += r.tokens, all.most = std::max(all.most, r.most);
    }
    write_scalar<T>(loss, total);
    const double terms = std::max(all.terms, 1.0);
    const double found[kPolicyStats] = {all.high / terms, all.low / terms, all.ratio / terms,
                                        all.most, -all.log_ratio / std::max(all.tokens, 1.0),
                                        all.terms};
    for (int i = 0; i < kPolicyStats; ++i) data_as<float>(stats)[i] = static_cast<float>(found[i]);
  });
  return {loss, stats};
}

Tensor policy_loss_backward_op(Tensor grad, Tensor logp_new, Tensor logp_old, Tensor adv,
                               Tensor seg, double eps_lo, double eps_hi, std::string ratio,
                               std::string agg, double denom, std::string weight) {
  constexpr auto kOp = "ma_ppo_policy_loss_backward";
  const PolicyRule p = check_policy(kOp, eps_lo, eps_hi, ratio, agg, denom, weight);
  const PolicyInputs in(kOp, logp_new, logp_old, adv, seg);
  TENFOLD_CHECK_VALUE(grad.numel() == 1, "tenfold::", kOp, ": grad must be 0-d, got ",
                      shape_str(grad));
  check_same_dtype(kOp, "grad", grad, "logp_new", in.now);
  const int64_t width = in.seg.sizes()[1];
  const Tensor out = new_output(in.now, {in.seg.sizes()[0], width}, in.now.scalar_type());
  with_real(in.now, [&]<class T>() {
    const std::vector<Sums> rows = in.sums<T>(p);
    const Mean mean(p.agg, p.denom, rows);
    const double by = static_cast<double>(*data_as<T>(grad));
    over_rows(in.seg, width, [&](int64_t b, const Row& row) {
      const PolicyRow<T> x = in.row<T>(b);
      const double scale = by * mean.scale(rows[b]);
      T* const to = data_as<T>(out) + b * width;
      Macro macro;
      if (p.ratio != RatioBy::token) {
        macro.read(p, x, row);
        for (int64_t t = 0; t < width; ++t) {
          const int32_t length = row.lengths()[t];
          if (length == 0) continue;
          const double each = p.ratio == RatioBy::geo_mean ? static_cast<double>(length) : 1.0;
          macro.log_ratio[t] = policy_term(p, macro.log_ratio[t], macro.adv[t]).slope *
                               weight_of(p, length) / each;  // now: the slope
        }
      }
      for (int64_t j = 0; j < width; ++j) {
        const int32_t s = row.segment(j);
        const double slope =
            s < 0                        ? 0.0
            : p.ratio == RatioBy::token ? policy_term(p, x.log_ratio(j),
                                                      static_cast<double>(x.adv[j])).slope
                                         : macro.log_ratio[s];
        to[j] = s < 0 ? T{0} : static_cast<T>(slope * scale);
      }
    });
  });
  return out;
}

struct ValueInputs {
  Tensor mask, now, old, ret;

  ValueInputs(const char* op, const Tensor& v_new, const Tensor& v_old, const Tensor& ret_in,
              const Tensor& mask_in)
      : mask(mask_in.is_contiguous() ? mask_in : torch::stable::contiguous(mask_in)),
        now(check_rows(op, "v_new", v_new, mask)),
        old(check_rows(op, "v_old", v_old, mask)),
        ret(check_rows(op, "ret", ret_in, mask)) {
    const auto s = mask.scalar_type();
    TENFOLD_CHECK_TYPE(s == ScalarType::Bool || s == ScalarType::Byte || s == ScalarType::Char,
                       "tenfold::", op, ": mask must be bool, int8 or uint8, got ", dtype_name(s));
    check_dim(op, "mask", mask, 2, "[B, R]");
    check_same_dtype(op, "v_old", old, "v_new", now);
    check_same_dtype(op, "ret", ret, "v_new", now);
  }

  // f(j, term) for the valid tokens of row b.
  template <class T, class F>
  void over_row(int64_t b, double clip, const F& f) const {
    const int64_t width = mask.sizes()[1], at = b * width;
    const auto* on = static_cast<const uint8_t*>(mask.data_ptr()) + at;
    const T *x = data_as<T>(now) + at, *y = data_as<T>(old) + at, *r = data_as<T>(ret) + at;
    for (int64_t j = 0; j < width; ++j)
      if (on[j] != 0)
        f(j, value_term(clip, static_cast<double>(x[j]), static_cast<double>(y[j]),
                        static_cast<double>(r[j])));
  }

  template <class F>
  void over_rows(const F& f) const {
    parallel_for(mask.sizes()[0], kMicrosPerToken * static_cast<double>(mask.sizes()[1] + 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t b = begin; b < end; ++b) f(b);
                 });
  }

  template <class T>
  std::vector<Sums> sums(double clip) const {
    std::vector<Sums> made(mask.sizes()[0]);
    over_rows([&](int64_t b) {
      Sums& s = made[b];
      over_row<T>(b, clip, [&](int64_t, const ValueTerm& t) {
        s.loss += t.loss, s.weight += 1.0, s.high += t.clipped, s.ratio += t.error;
      });
    });
    return made;
  }
};

void check_clip(const char* op, double clip, double denom) {
  TENFOLD_CHECK_VALUE(clip >= 0.0, "tenfold::", op, ": clip must be at least 0, got ", clip);
  TENFOLD_CHECK_VALUE(denom >= 0.0, "tenfold::", op, ": denom must be at least 0, got ", denom);
}

std::tuple<Tensor, Tensor> value_loss_op(Tensor v_new, Tensor v_old, Tensor ret, Tensor mask,
                                         double clip, std::string agg, double denom) {
  constexpr auto kOp = "ma_ppo_value_loss";
  check_clip(kOp, clip, denom);
  const AggregateBy by = to_aggregate(kOp, agg);
  const ValueInputs in(kOp, v_new, v_old, ret, mask);
  const Tensor loss = new_output(in.now, {}, in.now.scalar_type());
  const Tensor stats = new_output(in.now, {kValueStats}, ScalarType::Float);
  with_real(in.now, [&]<class T>() {
    const std::vector<Sums> rows = in.sums<T>(clip);
    const Mean mean(by, denom, rows);
    double total = 0.0, clipped = 0.0, error = 0.0, count = 0.0;
    for (const Sums& r : rows)
      total += r.loss * mean.scale(r), clipped += r.high, error += r.ratio, count += r.weight;
    write_scalar<T>(loss, total);
    const double some = std::max(count, 1.0);
    const double found[kValueStats] = {clipped / some, error / some, count};
    for (int i = 0; i < kValueStats; ++i) data_as<float>(stats)[i] = static_cast<float>(found[i]);
  });
  return {loss, stats};
}

Tensor value_loss_backward_op(Tensor grad, Tensor v_new, Tensor v_old, Tensor ret, Tensor mask,
                              double clip, std::string agg, double denom) {
  constexpr auto kOp = "ma_ppo_value_loss_backward";
  check_clip(kOp, clip, denom);
  const AggregateBy by = to_aggregate(kOp, agg);
  const ValueInputs in(kOp, v_new, v_old, ret, mask);
  TENFOLD_CHECK_VALUE(grad.numel() == 1, "tenfold::", kOp, ": grad must be 0-d, got ",
                      shape_str(grad));
  check_same_dtype(kOp, "grad", grad, "v_new", in.now);
  const int64_t width = in.mask.sizes()[1];
  const Tensor out = new_output(in.now, {in.mask.sizes()[0], width}, in.now.scalar_type());
  with_real(in.now, [&]<class T>() {
    const std::vector<Sums> rows = in.sums<T>(clip);
    const Mean mean(by, denom, rows);
    const double times = static_cast<double>(*data_as<T>(grad));
    in.over_rows([&](int64_t b) {
      T* const to = data_as<T>(out) + b * width;
      std::fill(to, to + width, T{0});
      const double scale = times * mean.scale(rows[b]);
      in.over_row<T>(b, clip, [&](int64_t j, const ValueTerm& t) {
        to[j] = static_cast<T>(t.slope * scale);
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("ma_ppo_policy_loss", TORCH_BOX(&tenfold::cpu::policy_loss_op));
  m.impl("ma_ppo_policy_loss_backward", TORCH_BOX(&tenfold::cpu::policy_loss_backward_op));
  m.impl("ma_ppo_value_loss", TORCH_BOX(&tenfold::cpu::value_loss_op));
  m.impl("ma_ppo_value_loss_backward", TORCH_BOX(&tenfold::cpu::value_loss_backward_op));
}
