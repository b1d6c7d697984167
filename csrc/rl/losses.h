// SPDX-License-Identifier: Apache-2.0
// PPO's losses over macro actions (MA-RLHF sections 3.8 and 3.9): the terms, and their derivatives.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "rl/rows.h"

namespace tenfold {

enum class RatioBy : int { token, joint, geo_mean };
enum class AggregateBy : int { token_mean, seq_mean_token_mean };

constexpr double kLogRatioBound = 20.0;
constexpr int kPolicyStats = 6, kValueStats = 3;

struct PolicyRule {
  double eps_lo, eps_hi;
  RatioBy ratio;
  bool by_length;  // a macro action counts as often as it has tokens
};

struct PolicyTerm {
  double loss, slope;  // slope: of the loss by the log-ratio
  double ratio;
  bool clipped_high, clipped_low;
};

TENFOLD_HD PolicyTerm policy_term(const PolicyRule& p, double log_ratio, double adv) {
  const bool inside = std::fabs(log_ratio) <= kLogRatioBound;
  const double d = inside ? log_ratio : log_ratio > 0.0 ? kLogRatioBound : -kLogRatioBound;
  const double q = std::exp(d), low = 1.0 - p.eps_lo, high = 1.0 + p.eps_hi;
  const double bounded = q < low ? low : q > high ? high : q;
  const double plain = -adv * q, other = -adv * bounded;
  PolicyTerm t{};
  t.clipped_high = adv > 0.0 && q > high;
  t.clipped_low = adv < 0.0 && q < low;
  t.loss = plain > other ? plain : other;
  t.slope = inside && !t.clipped_high && !t.clipped_low ? plain : 0.0;
  t.ratio = q;
  if (log_ratio != log_ratio || adv != adv) t.loss = t.slope = log_ratio + adv;  // NaN stays
  return t;
}

struct ValueTerm {
  double loss, slope;  // by the new value
  double error;        // squared, not clipped
  bool clipped;
};

TENFOLD_HD ValueTerm value_term(double clip, double now, double old, double target) {
  const double bounded = now < old - clip ? old - clip : now > old + clip ? old + clip : now;
  const double a = now - target, b = bounded - target;
  ValueTerm t{};
  t.error = a * a;
  t.clipped = b * b > a * a;
  t.loss = 0.5 * (t.clipped ? b * b : a * a);
  // Where the bound holds, the worse term does not depend on the value.
  t.slope = t.clipped ? (bounded == now ? b : 0.0) : a;
  return t;
}

template <class T>
struct PolicyParams {
  SegmentRows seg;
  const T *now, *old, *adv;
  PolicyRule rule;
  T* slope;  // as seg; null: not asked for
};

template <class T>
struct ValueParams {
  Rows rows;
  const uint8_t* mask;
  const T *now, *old, *ret;
  double clip;
  T* slope;  // likewise
};

// Sums over the terms of a row, or of a part of one.
struct RowSums {
  double loss = 0.0, weight = 0.0;              // of weighted terms, and of weights
  double tokens = 0.0, log_ratio = 0.0;         // policy: of tokens
  double terms = 0.0, ratio = 0.0, most = 0.0;  // of terms, not weighted; value: ratio is the error
  double high = 0.0, low = 0.0;                 // clipped terms; value: high

  TENFOLD_HD_MEMBER void add(const PolicyTerm& t, double w) {
    loss += t.loss * w, weight += w, ratio += t.ratio;
    most = t.ratio > most ? t.ratio : most;
    high += t.clipped_high, low += t.clipped_low, terms += 1.0;
  }
  TENFOLD_HD_MEMBER void add(const ValueTerm& t) {
    loss += t.loss, weight += 1.0, high += t.clipped, ratio += t.error;
  }
  TENFOLD_HD_MEMBER void add(const RowSums& s) {
    loss += s.loss, weight += s.weight, tokens += s.tokens, log_ratio += s.log_ratio;
    terms += s.terms, ratio += s.ratio, high += s.high, low += s.low;
    most = s.most > most ? s.most : most;
  }
};

struct MeanRule {
  AggregateBy agg;
  double denom;

  // What a loss is divided by, of the sum of weights and the rows that have any.
  TENFOLD_HD_MEMBER double divisor(double weight, double filled) const {
    const double count = agg == AggregateBy::token_mean ? weight : filled;
    return denom > 0.0 ? denom : count > 1.0 ? count : 1.0;
  }
  // What a row's sum is multiplied by.
  TENFOLD_HD_MEMBER double scale(double weight, double by) const {
    if (agg == AggregateBy::token_mean) return 1.0 / by;
    return weight > 0.0 ? 1.0 / (weight * by) : 0.0;
  }
};

TENFOLD_HD void write_policy_stats(const RowSums& all, float* stats) {
  const double terms = all.terms > 1.0 ? all.terms : 1.0;
  const double found[kPolicyStats] = {all.high / terms,
                                      all.low / terms,
                                      all.ratio / terms,
                                      all.most,
                                      -all.log_ratio / (all.tokens > 1.0 ? all.tokens : 1.0),
                                      all.terms};
  for (int i = 0; i < kPolicyStats; ++i) stats[i] = static_cast<float>(found[i]);
}

TENFOLD_HD void write_value_stats(const RowSums& all, float* stats) {
  const double some = all.weight > 1.0 ? all.weight : 1.0;
  const double found[kValueStats] = {all.high / some, all.ratio / some, all.weight};
  for (int i = 0; i < kValueStats; ++i) stats[i] = static_cast<float>(found[i]);
}

// Weight of a macro action's term, and the derivative of its log-ratio by that of a token.
TENFOLD_HD double macro_weight(const PolicyRule& p, int64_t length) {
  return p.by_length ? static_cast<double>(length) : 1.0;
}
TENFOLD_HD double macro_share(const PolicyRule& p, int64_t length) {
  return p.ratio == RatioBy::geo_mean ? 1.0 / static_cast<double>(length) : 1.0;
}

// Of the backward: slope times grad times the scale of its row.
template <class T>
struct SlopeParams {
  Rows rows;
  const T *slope, *grad;
  const double* scale;
  T* out;
};

}  // namespace tenfold
