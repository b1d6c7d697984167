// SPDX-License-Identifier: Apache-2.0
// PPO's losses over a row of float32 tokens, for each instruction set: sums, and slopes if they are
// asked for. Lanes are added in float32 over a block of tokens, blocks in double.
#pragma once

#include "core/cpu/isa.h"
#include "rl/losses.h"

namespace tenfold {

// p points to the row; seg: int32.
TENFOLD_ISA_DECLARE(RowSums policy_tokens(const PolicyParams<float>& p, const int32_t* seg,
                                          int64_t width, int64_t begin))
// Memory for a row of macro actions, for width + 16 each: work four times.
struct PolicyRunMemory {
  float* work;
  uint32_t* ends;
  int32_t* length;
};

// A row of macro actions, if its valid tokens (seg < limit) are the first ones and their segments
// are consecutive; else false, and nothing is done. Of the slopes it writes those of valid tokens,
// `tokens` of sums in all.
TENFOLD_ISA_DECLARE(bool policy_runs(const PolicyParams<float>& p, const int32_t* seg,
                                     int64_t limit, const Span& row, const PolicyRunMemory& memory,
                                     RowSums* sums))
TENFOLD_ISA_DECLARE(RowSums value_tokens(const ValueParams<float>& p, int64_t width, int64_t begin))
// out = slope * by, 0 where slope is 0.
TENFOLD_ISA_DECLARE(void scale_slopes(const float* slope, int64_t n, double by, float* out))
TENFOLD_ISA_DECLARE(void scale_slopes(const double* slope, int64_t n, double by, double* out))

}  // namespace tenfold
