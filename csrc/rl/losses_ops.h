// What the CPU and CUDA registrations of PPO's losses share: argument checks.
#pragma once

#include <string>

#include "core/check.h"
#include "rl/losses.h"

namespace tenfold {

inline AggregateBy to_aggregate(const char* op, const std::string& agg) {
  TENFOLD_CHECK_VALUE(agg == "token_mean" || agg == "seq_mean_token_mean", "tenfold::", op,
                      ": agg must be token_mean or seq_mean_token_mean, got '", agg, "'");
  return agg == "token_mean" ? AggregateBy::token_mean : AggregateBy::seq_mean_token_mean;
}

inline PolicyRule check_policy(const char* op, double eps_lo, double eps_hi,
                               const std::string& ratio, const std::string& agg, double denom,
                               const std::string& weight) {
  TENFOLD_CHECK_VALUE(eps_lo >= 0.0 && eps_lo < 1.0, "tenfold::", op,
                      ": eps_lo must be in [0, 1), got ", eps_lo);
  TENFOLD_CHECK_VALUE(eps_hi >= 0.0, "tenfold::", op, ": eps_hi must be at least 0, got ", eps_hi);
  TENFOLD_CHECK_VALUE(ratio == "token" || ratio == "joint" || ratio == "geo_mean", "tenfold::", op,
                      ": ratio must be token, joint or geo_mean, got '", ratio, "'");
  TENFOLD_CHECK_VALUE(weight == "macro" || weight == "length", "tenfold::", op,
                      ": weight must be macro or length, got '", weight, "'");
  TENFOLD_CHECK_VALUE(denom >= 0.0, "tenfold::", op, ": denom must be at least 0, got ", denom);
  return {eps_lo,
          eps_hi,
          ratio == "token"   ? RatioBy::token
          : ratio == "joint" ? RatioBy::joint
                             : RatioBy::geo_mean,
          to_aggregate(op, agg),
          weight == "length",
          denom};
}

}  // namespace tenfold
