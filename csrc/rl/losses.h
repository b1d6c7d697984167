// PPO's losses over macro actions (MA-RLHF sections 3.8 and 3.9): the terms, and their derivatives.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace tenfold {

enum class RatioBy : int { token, joint, geo_mean };
enum class AggregateBy : int { token_mean, seq_mean_token_mean };

constexpr double kLogRatioBound = 20.0;
constexpr int kPolicyStats = 6, kValueStats = 3;

struct PolicyRule {
  double eps_lo, eps_hi;
  RatioBy ratio;
  AggregateBy agg;
  bool by_length;  // a macro action counts as often as it has tokens
  double denom;    // above 0: what the sum is divided by
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

}  // namespace tenfold
