// grad_norm (HFT section 6): L2 norm of all trained elements of a list of gradients, fp32 0-d.
//
//   norm = sqrt(sum of g^2) / |grad_scale|
//
// Order of the sums, the same for any number of threads: chunks of 2^15 elements (of each tensor,
// in storage order) are summed in float32, in vector lanes; the chunks are added in float64 in the
// order of the list. Rows and blocks that are frozen are not read; frozen elements do not count,
// even if they are NaN. Squares are float32, as torch's: gradients above 1e19 give inf.
// Traffic: every trained element once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"
#include "optim/mask.h"

namespace tenfold {

// Sum of squares of the trained elements of [begin, end).
TENFOLD_ISA_DECLARE(float grad_square_sum(const void* grad, Dtype dtype, const Mask& mask,
                                          int64_t begin, int64_t end))

}  // namespace tenfold
