// fuse_heads, its backward, and collapse_heads (DHA sections 3.1, 3.6): heads of a group mixed per
// dimension, in weight space. w [H, d, m], omega [N, g, g, d] float32, groups [N, g] a partition.
//
//   out[n, h, i, :]         = sum_j omega[n, h, j, i] * w[groups[n, j], i, :]
//   dw[groups[n, j], i, :]  = sum_h omega[n, h, j, i] * dout[n, h, i, :]
//   domega[n, h, j, i]      = sum over m of dout[n, h, i, :] * w[groups[n, j], i, :]
//   collapse: one output a group, with coefficients mean_h(omega[n, h, j, i])
//
// For fixed (n, i) each is a product of a g x g matrix with the g rows (m long) of the group's
// heads: rows are read once, all outputs of a block of columns are formed from it in registers.
// Traffic of the forward: H * d * m elements read and as many written; 2 * H * g * d * m FLOPs.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

// to[o][:] = sum_i coef[i * coef_pitch + o] * from[i][:], rows of `length` elements.
struct MixRows {
  const void* const* from;  // [num_in] rows
  void* const* to;          // [num_out] rows
  int64_t num_in, num_out;
  const float* coef;
  int64_t coef_pitch;
  int64_t length;
  Dtype dtype;
  bool stream;  // write past the caches: rows are 64-byte aligned and the output is large
};

// dots[i * num_b + j] = sum of a[i][:] * b[j][:].
struct RowDots {
  const void* const* a;  // [num_a] rows
  const void* const* b;  // [num_b] rows
  int64_t num_a, num_b;
  int64_t length;
  Dtype dtype;
  float* dots;
};

TENFOLD_ISA_DECLARE(void mix_rows(const MixRows& p))
TENFOLD_ISA_DECLARE(void row_dots(const RowDots& p))

}  // namespace tenfold
