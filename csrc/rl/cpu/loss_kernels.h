// PPO's losses over a row of float32 tokens, for each instruction set: sums, and slopes if they are
// asked for. Lanes are added in float32 over a block of tokens, blocks in double.
#pragma once

#include "core/cpu/isa.h"
#include "rl/losses.h"

namespace tenfold {

// p points to the row; seg: int32.
TENFOLD_ISA_DECLARE(RowSums policy_tokens(const PolicyParams<float>& p, const int32_t* seg,
                                          int64_t width, int64_t begin))
// Terms of macro actions, of a row's n valid tokens whose segments are consecutive. slope, null:
// not asked for. Memory for n + 16: work 4 times, ends and length.
TENFOLD_ISA_DECLARE(RowSums policy_runs(const PolicyRule& rule, const int32_t* seg, int64_t n,
                                        const float* now, const float* old, const float* adv,
                                        float* work, uint32_t* ends, int32_t* length, float* slope))
TENFOLD_ISA_DECLARE(RowSums value_tokens(const ValueParams<float>& p, int64_t width, int64_t begin))
// out = slope * by, 0 where slope is 0.
TENFOLD_ISA_DECLARE(void scale_slopes(const float* slope, int64_t n, double by, float* out))
TENFOLD_ISA_DECLARE(void scale_slopes(const double* slope, int64_t n, double by, double* out))

}  // namespace tenfold
