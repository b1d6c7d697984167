// PPO's losses over a row of float32 tokens, for each instruction set: sums, and slopes if they are
// asked for. Lanes are added in float32 over a block of tokens, blocks in double.
#pragma once

#include "core/cpu/isa.h"
#include "rl/losses.h"

namespace tenfold {

// p points to the row; seg: int32.
TENFOLD_ISA_DECLARE(RowSums policy_tokens(const PolicyParams<float>& p, const int32_t* seg,
                                          int64_t width, int64_t begin))
// Of macro actions; slope: weighted, by the log-ratio.
TENFOLD_ISA_DECLARE(RowSums policy_terms(const PolicyRule& rule, const float* log_ratio,
                                         const float* adv, const float* weight, int64_t count,
                                         float* slope))
TENFOLD_ISA_DECLARE(RowSums value_tokens(const ValueParams<float>& p, int64_t width, int64_t begin))
// out = slope * by, 0 where slope is 0.
TENFOLD_ISA_DECLARE(void scale_slopes(const float* slope, int64_t n, double by, float* out))
TENFOLD_ISA_DECLARE(void scale_slopes(const double* slope, int64_t n, double by, double* out))

}  // namespace tenfold
