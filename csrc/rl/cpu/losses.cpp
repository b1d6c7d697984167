// CPU registration of PPO's losses. The sums of rows are added in order: results do not depend on
// threads.
#include "rl/losses.h"

#include <torch/csrc/stable/library.h>

#include <type_traits>
#include <vector>

#include "rl/cpu/loss_kernels.h"
#include "rl/cpu/rows.h"
#include "rl/losses_ops.h"

namespace tenfold::cpu {
namespace {

// One thread's share; a vector operation does several tokens at a time.
constexpr double kMicrosPerToken = 0.0006, kMicrosPerMacro = 0.006;

using Doubles = std::vector<double>;

// Of all kinds of terms, in double.
template <class T>
class PolicyRows {
 public:
  explicit PolicyRows(const PolicyParams<T>& p)
      : p_(p),
        tokens_(p.seg.rows.width),
        ratio_(p.seg.rows.width),
        adv_(ratio_),
        sum_r_(ratio_),
        sum_a_(ratio_),
        length_(ratio_.size()),
        ends_(ratio_.size() + 16),
        lanes_(std::is_same_v<T, float> ? 4 * ratio_.size() : 0) {}

  RowSums run(int64_t row) {
    const Span span = p_.seg.rows[row];
    tokens_.read(p_.seg[row], span.width);
    const int64_t n = tokens_.count(), at = span.begin;
    RowSums sums;
    sums.tokens = static_cast<double>(n);
    sums.log_ratio =
        TENFOLD_ISA_CALL(kl_terms, tokens_.pick(p_.now + at, &memory_[0]),
                         tokens_.pick(p_.old + at, &memory_[1]), n, KlBy::k1, 1.0, ratio_.data());
    TENFOLD_ISA_CALL(widen, tokens_.pick(p_.adv + at, &memory_[0]), n, adv_.data());
    if (p_.rule.ratio == RatioBy::token) {
      for (int64_t q = 0; q < n; ++q) {
        const PolicyTerm t = policy_term(p_.rule, ratio_[q], adv_[q]);
        sums.add(t, 1.0);
        ratio_[q] = t.slope;
      }
    } else {
      macro_terms(n, span.width, &sums);
    }
    if (p_.slope == nullptr) return sums;
    T* const to = tokens_.target(p_.slope + at, &memory_[0]);
    for (int64_t q = 0; q < n; ++q) to[q] = static_cast<T>(ratio_[q]);
    tokens_.place(to, p_.slope + at);
    return sums;
  }

 private:
  // Leaves the slopes of tokens in ratio_.
  void macro_terms(int64_t n, int64_t width, RowSums* sums) {
    int64_t found = width;
    if (tokens_.consecutive()) {
      found = TENFOLD_ISA_CALL(consecutive_sums, tokens_.segments(), n, ratio_.data(), adv_.data(),
                               ends_.data(), sum_r_.data(), sum_a_.data(), length_.data());
    } else {
      std::fill_n(length_.begin(), width, 0);
      TENFOLD_ISA_CALL(segment_sums, tokens_.segments(), n, ratio_.data(), adv_.data(),
                       sum_r_.data(), sum_a_.data(), length_.data());
    }
    if constexpr (std::is_same_v<T, float>) {
      lane_terms(found, sums);
    } else {
      for (int64_t t = 0; t < found; ++t) {
        const int32_t l = length_[t];
        if (l == 0) continue;
        const double share = macro_share(p_.rule, l), weight = macro_weight(p_.rule, l);
        const PolicyTerm term =
            policy_term(p_.rule, sum_r_[t] * share, sum_a_[t] / static_cast<double>(l));
        sums->add(term, weight);
        sum_r_[t] = term.slope * share * weight;
      }
    }
    for (int64_t q = 0; q < n; ++q) ratio_[q] = sum_r_[tokens_.segments()[q]];
  }

  // The terms of macro actions [0, found) that have tokens, several at a time; then their slopes by
  // a token's log-ratio in sum_r_.
  void lane_terms(int64_t found, RowSums* sums) {
    float *const ratio = lanes_.data(), *const adv = ratio + lanes_.size() / 4,
                 *const weight = adv + lanes_.size() / 4, *const slope = weight + lanes_.size() / 4;
    int64_t count = 0;
    for (int64_t t = 0; t < found; ++t) {
      const int32_t l = length_[t];
      if (l == 0) continue;
      ratio[count] = static_cast<float>(sum_r_[t] * macro_share(p_.rule, l));
      adv[count] = static_cast<float>(sum_a_[t] / static_cast<double>(l));
      weight[count++] = static_cast<float>(macro_weight(p_.rule, l));
    }
    sums->add(TENFOLD_ISA_CALL(policy_terms, p_.rule, ratio, adv, weight, count, slope));
    count = 0;
    for (int64_t t = 0; t < found; ++t)
      if (length_[t] != 0)
        sum_r_[t] = static_cast<double>(slope[count++]) * macro_share(p_.rule, length_[t]);
  }

  const PolicyParams<T>& p_;
  ValidTokens tokens_;
  Doubles ratio_, adv_, sum_r_, sum_a_;
  std::vector<int32_t> length_;
  std::vector<uint32_t> ends_;
  std::vector<float> lanes_;
  std::vector<T> memory_[2];
};

// sums[row] = f(row, scratch made by `make`).
template <class Make>
std::vector<RowSums> sum_rows(const Rows& rows, double micros_per_token, const Make& make) {
  std::vector<RowSums> sums(rows.count);
  parallel_for(rows.count, micros_per_token * static_cast<double>(rows.width + 64),
               [&](int64_t begin, int64_t end) {
                 auto of_row = make();
                 for (int64_t row = begin; row < end; ++row) sums[row] = of_row(row);
               });
  return sums;
}

std::vector<RowSums> policy_sums(const PolicyParams<float>& p) {
  if (p.rule.ratio != RatioBy::token)
    return sum_rows(p.seg.rows, kMicrosPerMacro, [&] {
      return [rows = PolicyRows<float>(p)](int64_t row) mutable { return rows.run(row); };
    });
  return sum_rows(p.seg.rows, kMicrosPerToken, [&] {
    return [&p, ids = std::vector<int32_t>()](int64_t row) mutable {
      const Span span = p.seg.rows[row];
      const SegmentRow seg = p.seg[row];
      const auto* data = static_cast<const int32_t*>(seg.ids.data);
      if (seg.ids.wide) {
        ids.resize(span.width);
        for (int64_t j = 0; j < span.width; ++j) ids[j] = seg[j];
        data = ids.data();
      }
      return TENFOLD_ISA_CALL(policy_tokens, p, data, span.width, span.begin);
    };
  });
}

std::vector<RowSums> policy_sums(const PolicyParams<double>& p) {
  return sum_rows(p.seg.rows, kMicrosPerMacro, [&] {
    return [rows = PolicyRows<double>(p)](int64_t row) mutable { return rows.run(row); };
  });
}

std::vector<RowSums> value_sums(const ValueParams<float>& p) {
  return sum_rows(p.rows, kMicrosPerToken, [&] {
    return [&p](int64_t row) {
      const Span span = p.rows[row];
      return TENFOLD_ISA_CALL(value_tokens, p, span.width, span.begin);
    };
  });
}

std::vector<RowSums> value_sums(const ValueParams<double>& p) {
  return sum_rows(p.rows, kMicrosPerMacro, [&] {
    return [&p](int64_t row) {
      const Span span = p.rows[row];
      RowSums sums;
      for (int64_t i = span.begin; i < span.begin + span.width; ++i) {
        ValueTerm t{};
        if (p.mask[i] != 0) {
          t = value_term(p.clip, p.now[i], p.old[i], p.ret[i]);
          sums.add(t);
        }
        if (p.slope != nullptr) p.slope[i] = t.slope;
      }
      return sums;
    };
  });
}

// Loss and scales of rows; the sums over all of them.
template <class T>
RowSums finish(const std::vector<RowSums>& rows, const LossOut& out) {
  RowSums all;
  double filled = 0.0, total = 0.0;
  for (const RowSums& r : rows) all.add(r), filled += r.weight > 0.0;
  const double by = out.mean.divisor(all.weight, filled);
  double* const scale = out.scale ? data_as<double>(*out.scale) : nullptr;
  for (size_t b = 0; b < rows.size(); ++b) {
    const double s = out.mean.scale(rows[b].weight, by);
    total += rows[b].loss * s;
    if (scale != nullptr) scale[b] = s;
  }
  *data_as<T>(out.loss) = static_cast<T>(total);
  return all;
}

void policy_loss(const PolicyCall& call) {
  with_real(call.now, [&]<class T>() {
    const PolicyParams<T> p = call.params<T>();
    write_policy_stats(finish<T>(policy_sums(p), call.out), data_as<float>(call.out.stats));
  });
}

void value_loss(const ValueCall& call) {
  with_real(call.now, [&]<class T>() {
    const ValueParams<T> p = call.params<T>();
    write_value_stats(finish<T>(value_sums(p), call.out), data_as<float>(call.out.stats));
  });
}

void loss_backward(const SlopeCall& call) {
  with_real(call.slope, [&]<class T>() {
    const SlopeParams<T> p = call.params<T>();
    parallel_for(p.rows.count, 0.0002 * static_cast<double>(p.rows.width + 64),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) {
                     const Span span = p.rows[row];
                     TENFOLD_ISA_CALL(scale_slopes, p.slope + span.begin, span.width,
                                      static_cast<double>(*p.grad) * p.scale[row],
                                      p.out + span.begin);
                   }
                 });
  });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::LossOps<&tenfold::cpu::policy_loss, &tenfold::cpu::value_loss,
                               &tenfold::cpu::loss_backward>;
  m.impl("ma_ppo_policy_loss", TORCH_BOX(&Ops::policy));
  m.impl("ma_ppo_policy_loss_forward", TORCH_BOX(&Ops::policy_forward));
  m.impl("ma_ppo_value_loss", TORCH_BOX(&Ops::value));
  m.impl("ma_ppo_value_loss_forward", TORCH_BOX(&Ops::value_forward));
  m.impl("ma_ppo_loss_backward", TORCH_BOX(&Ops::backward));
}
