// SPDX-License-Identifier: Apache-2.0
// fusion_mse and its backward (DHA section 3.5): how far apart the fused heads of each group are.
// omega [N, g, g, d] float32 -> mse [N] float32.
//
//   mse[n] = mean over pairs h < h', over j and i, of (omega[n,h,j,i] - omega[n,h',j,i])^2
//          = sum over h, j, i of (omega[n,h,j,i] - mean_h)^2 * 2 / ((g - 1) g d);  0 if g = 1
//   domega[n,h,j,i] = dout[n] * (omega[n,h,j,i] - mean_h) * 4 / ((g - 1) g d)
//
// Deviations from the mean instead of g * sum of squares - square of the sum: it costs the same and
// does not cancel where training ends, with heads that are almost equal. One pass, O(N g g d).
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"

namespace tenfold {

// 2 / ((g - 1) g d), or 0 without a pair.
constexpr double fusion_mse_scale(int64_t g, int64_t d) {
  return g < 2 || d < 1 ? 0.0 : 2.0 / (static_cast<double>(g - 1) * static_cast<double>(g * d));
}

// `count` neighbours among the g * d of a group, of all heads, which lie `head_stride` apart: a
// page of each, since heads lie a power of two apart, which few sets of the first cache hold.
constexpr int64_t kFusionChunk = 1024;

struct FusionChunk {
  const float* from;
  int64_t head_stride, heads, count;
};

// Sum of squared deviations.
TENFOLD_ISA_DECLARE(float fusion_deviation(const FusionChunk& c))
// out = factor * deviation, laid out as `from`; past the caches where all of it is aligned.
TENFOLD_ISA_DECLARE(void fusion_deviation_backward(const FusionChunk& c, float factor, float* out,
                                                   bool past))

}  // namespace tenfold
