// head_cka (DHA section 3.0): linear-kernel similarity of every two heads. w [H, d, m] -> [H, H]
// float32, with X = w[a]^T and Y = w[b]^T, both [m, d]:
//
//   CKA(X, Y) = ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F),  X^T Y = w[a] w[b]^T  [d, d]
//   center: each column of X, which is a row of w, has its mean subtracted first
//
// The squares of a block of the Gram matrix are summed where they arise: no [H d, H d] matrix
// exists. Only blocks a <= b are computed: H (H + 1) / 2 * 2 d d m FLOPs.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

// Sum over all pairs of rows (one of a, one of b) of the square of their product.
struct GramBlock {
  const void* a;  // [dims] rows
  const void* b;
  int64_t a_stride, b_stride;  // elements
  int64_t dims, length;
  Dtype dtype;
  const float* a_mean;  // [dims] to subtract, or null
  const float* b_mean;
};

TENFOLD_ISA_DECLARE(double gram_square_sum(const GramBlock& p))
TENFOLD_ISA_DECLARE(float row_mean(const void* row, Dtype dtype, int64_t length))

}  // namespace tenfold
