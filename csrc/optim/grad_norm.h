// SPDX-License-Identifier: Apache-2.0
// grad_norm (HFT section 6): L2 norm of all trained elements of a list of gradients, fp32 0-d.
//
//   norm = sqrt(sum of g^2) / |grad_scale|
//
// Order of the sums, the same for any number of threads: each chunk of a tensor (in storage order)
// is summed in float32 lanes, the lanes every few additions in float64, and the chunks in the order
// of the list. Rows and blocks that are frozen are not read; frozen elements do not count, even if
// they are NaN. Squares are float32, as torch's: gradients above 1e19 give inf. Traffic: every
// trained element once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"
#include "optim/mask.h"

namespace tenfold {

// Sum of squares of the trained elements of [begin, end).
TENFOLD_ISA_DECLARE(double grad_square_sum(const void* grad, Dtype dtype, const Mask& mask,
                                           int64_t begin, int64_t end))

}  // namespace tenfold
