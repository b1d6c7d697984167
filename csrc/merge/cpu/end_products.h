// SPDX-License-Identifier: Apache-2.0
// The products that slerp_merge of 16-bit tensors takes its angle from.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

// Of 16-bit elements [begin, end): adds x x, x y and y y to sums. Products of such numbers are
// exact in float32, in which strips of a few hundred are summed: half the work of float64
// throughout. Not finite where that overflows.
TENFOLD_ISA_DECLARE(void end_products(const void* x, const void* y, Dtype dtype, int64_t begin,
                                      int64_t end, double* sums))

}  // namespace tenfold
