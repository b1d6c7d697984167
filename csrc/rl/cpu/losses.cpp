// SPDX-License-Identifier: Apache-2.0
// CPU registration of PPO's losses. The sums of rows are added in order: results do not depend on
// threads.
#include "rl/losses.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <type_traits>
#include <vector>

#include "rl/cpu/loss_kernels.h"
#include "rl/cpu/rows.h"
#include "rl/losses_ops.h"

namespace tenfold::cpu {
namespace {

// One thread's share; a vector operation does several tokens at a time.
constexpr double kMicrosPerToken = 0.0006, kMicrosPerMacro = 0.0015;

using Doubles = std::vector<double>;

// Terms of tokens or macro actions, in double but where policy_runs takes them.
template <class T>
class PolicyRows {
 public:
  explicit PolicyRows(const PolicyParams<T>& p) : p_(p), tokens_(p.seg.rows.width) {}

  RowSums run(int64_t row) {
    RowSums sums;
    const Span span = p_.seg.rows[row];
    if (run_at_once(row, span, &sums)) return sums;
    tokens_.read(p_.seg[row], span.width);
    const int64_t n = tokens_.count(), at = span.begin;
    for (Doubles* x : {&ratio_, &adv_, &sum_r_, &sum_a_}) x->resize(span.width);
    sums.tokens = static_cast<double>(n);
    sums.log_ratio =
        TENFOLD_ISA_CALL(kl_terms, tokens_.pick(p_.now + at, &memory_[0]),
                         tokens_.pick(p_.old + at, &memory_[1]), n, KlBy::k1, 1.0, ratio_.data());
    TENFOLD_ISA_CALL(widen, tokens_.pick(p_.adv + at, &memory_[0]), n, adv_.data());
    if (p_.rule.ratio == RatioBy::token) {
      token_terms(n, &sums);
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
  bool run_at_once(int64_t row, const Span& span, RowSums* sums) {
    const SegmentRow seg = p_.seg[row];
    if constexpr (std::is_same_v<T, float>) {
      const auto* ids = static_cast<const int32_t*>(seg.ids.data);
      if (seg.ids.wide) {
        ids_.resize(span.width);
        for (int64_t j = 0; j < span.width; ++j) ids_[j] = seg[j];
        ids = ids_.data();
      }
      const size_t room = span.width + 16;
      work_.resize(4 * room), ends_.resize(room), length_.resize(room);
      if (!TENFOLD_ISA_CALL(policy_runs, p_, ids, seg.limit, span,
                            {work_.data(), ends_.data(), length_.data()}, sums))
        return false;
      if (p_.slope != nullptr) {
        const auto n = static_cast<int64_t>(sums->tokens);
        std::fill(p_.slope + span.begin + n, p_.slope + span.begin + span.width, T{0});
      }
      return true;
    }
    return false;
  }

  // Both leave the slopes of tokens in ratio_.
  void token_terms(int64_t n, RowSums* sums) {
    for (int64_t q = 0; q < n; ++q) {
      const PolicyTerm t = policy_term(p_.rule, ratio_[q], adv_[q]);
      sums->add(t, 1.0);
      ratio_[q] = t.slope;
    }
  }

  void macro_terms(int64_t n, int64_t width, RowSums* sums) {
    length_.assign(width, 0);
    TENFOLD_ISA_CALL(segment_sums, tokens_.segments(), n, ratio_.data(), adv_.data(), sum_r_.data(),
                     sum_a_.data(), length_.data());
    for (int64_t t = 0; t < width; ++t) {
      const int32_t l = length_[t];
      if (l == 0) continue;
      const double share = macro_share(p_.rule, l), weight = macro_weight(p_.rule, l);
      const PolicyTerm term =
          policy_term(p_.rule, sum_r_[t] * share, sum_a_[t] / static_cast<double>(l));
      sums->add(term, weight);
      sum_r_[t] = term.slope * share * weight;
    }
    for (int64_t q = 0; q < n; ++q) ratio_[q] = sum_r_[tokens_.segments()[q]];
  }

  const PolicyParams<T>& p_;
  ValidTokens tokens_;
  Doubles ratio_, adv_, sum_r_, sum_a_;
  std::vector<int32_t> ids_, length_;
  std::vector<uint32_t> ends_;
  std::vector<float> work_;
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

// Whether segments are numbered in order, of rows that are about to be read anyway.
class NumberedRows {
 public:
  NumberedRows(const SegmentRows& seg, bool wanted)
      : seg_(seg), wrong_(wanted ? seg.rows.count : 0, 0) {}

  // What a task does before a row.
  auto looker() {
    return [this, tokens = ValidTokens(seg_.rows.width)](int64_t row) mutable {
      if (wrong_.empty()) return;
      const Span span = seg_.rows[row];
      wrong_[row] = numbered_segments(seg_.ids.from(span.begin), span.width, &tokens) < 0;
    };
  }
  void check() const {
    std::string rows;
    int named = 0;
    for (size_t b = 0; b < wrong_.size(); ++b)
      if (wrong_[b] != 0 && named++ < 8) rows += (rows.empty() ? "" : ", ") + std::to_string(b);
    TENFOLD_CHECK_VALUE(named == 0,
                        "tenfold::ma_ppo_policy_loss: seg must number the macro actions of a row "
                        "0, 1, ... without gaps, and be -1 at masked tokens; rows [",
                        rows, "] do not");
  }

 private:
  const SegmentRows& seg_;
  std::vector<char> wrong_;
};

std::vector<RowSums> policy_sums(const PolicyParams<float>& p, NumberedRows* numbered) {
  if (p.rule.ratio != RatioBy::token)
    return sum_rows(p.seg.rows, kMicrosPerMacro, [&] {
      return [look = numbered->looker(), rows = PolicyRows<float>(p)](int64_t row) mutable {
        look(row);
        return rows.run(row);
      };
    });
  return sum_rows(p.seg.rows, kMicrosPerToken, [&] {
    return [&p, look = numbered->looker(), ids = std::vector<int32_t>()](int64_t row) mutable {
      look(row);
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

std::vector<RowSums> policy_sums(const PolicyParams<double>& p, NumberedRows* numbered) {
  return sum_rows(p.seg.rows, kMicrosPerMacro, [&] {
    return [look = numbered->looker(), rows = PolicyRows<double>(p)](int64_t row) mutable {
      look(row);
      return rows.run(row);
    };
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

template <class T>
void scale_rows(const Rows& rows, const T* slope, const double* scale, double by, T* out) {
  parallel_for(rows.count, 0.0002 * static_cast<double>(rows.width + 64),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   const Span span = rows[row];
                   TENFOLD_ISA_CALL(scale_slopes, slope + span.begin, span.width, by * scale[row],
                                    out + span.begin);
                 }
               });
}

// The loss, and slopes by their scales while they are in the cache: the scales left for the
// backward are 1. Back: the sums over all rows.
template <class T>
RowSums finish(const std::vector<RowSums>& sums, const Rows& rows, const LossOut& out, T* slope) {
  RowSums all;
  double filled = 0.0, total = 0.0;
  for (const RowSums& r : sums) all.add(r), filled += r.weight > 0.0;
  const double by = out.mean.divisor(all.weight, filled);
  std::vector<double> scale(sums.size());
  for (size_t b = 0; b < sums.size(); ++b) {
    scale[b] = out.mean.scale(sums[b].weight, by);
    total += sums[b].loss * scale[b];
  }
  *data_as<T>(out.loss) = static_cast<T>(total);
  if (slope != nullptr) {
    scale_rows(rows, slope, scale.data(), 1.0, slope);
    std::fill_n(data_as<double>(*out.scale), sums.size(), 1.0);
  }
  return all;
}

void policy_loss(const PolicyCall& call) {
  with_real(call.now, [&]<class T>() {
    const PolicyParams<T> p = call.params<T>();
    NumberedRows numbered(p.seg, call.validate);
    const std::vector<RowSums> sums = policy_sums(p, &numbered);
    numbered.check();
    write_policy_stats(finish(sums, p.seg.rows, call.out, p.slope), data_as<float>(call.out.stats));
  });
}

void value_loss(const ValueCall& call) {
  with_real(call.now, [&]<class T>() {
    const ValueParams<T> p = call.params<T>();
    write_value_stats(finish(value_sums(p), p.rows, call.out, p.slope),
                      data_as<float>(call.out.stats));
  });
}

void loss_backward(const SlopeCall& call) {
  with_real(call.slope, [&]<class T>() {
    const SlopeParams<T> p = call.params<T>();
    scale_rows(p.rows, p.slope, p.scale, static_cast<double>(*p.grad), p.out);
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
