// SPDX-License-Identifier: Apache-2.0
// Loops of segment_mean over the tokens of a row. Numbers of segments are int32, -1 for tokens that
// are not read. Neighbours mostly have the same one: such runs go a vector at a time.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"

namespace tenfold {

// seg: int64 if `wide`, else int32; numbers outside [0, limit) become -1.
TENFOLD_ISA_DECLARE(void segments_inside(const void* seg, bool wide, int64_t n, int32_t limit,
                                         int32_t* out))
// Adds to the sums (null: they are not wanted) and the counts.
TENFOLD_ISA_DECLARE(void add_segments(const float* x, const int32_t* seg, int64_t n, double* sums,
                                      int32_t* counts))
// out[i] = values[seg[i]], or 0.
TENFOLD_ISA_DECLARE(void spread_segments(const float* values, const int32_t* seg, int64_t n,
                                         float* out))

}  // namespace tenfold
