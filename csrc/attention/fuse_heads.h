// SPDX-License-Identifier: Apache-2.0
// fuse_heads, its backward, and collapse_heads (DHA sections 3.1, 3.6): heads of a group mixed per
// dimension, in weight space. w [H, d, m], omega [N, g, g, d] float32, groups [N, g] a partition.
//
//   out[n, h, i, :]         = sum_j omega[n, h, j, i] * w[groups[n, j], i, :]
//   dw[groups[n, j], i, :]  = sum_h omega[n, h, j, i] * dout[n, h, i, :]
//   domega[n, h, j, i]      = sum over m of dout[n, h, i, :] * w[groups[n, j], i, :]
//   collapse: one output a group, with coefficients mean_h(omega[n, h, j, i])
//
// For fixed (n, i) each is a product of a g x g matrix with the g rows (m long) of the group's
// heads: rows are read once, and a block of outputs is formed from them in registers. Rows of one
// dim lie d * m elements apart, often a power of two: the lines of more than a few of them share a
// cache set. So what is read more than once is first copied, as float32, to a strip of kFuseStrip
// columns.
//
// Traffic of the forward: H * d * m elements read and as many written; 2 * H * g * d * m FLOPs.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kFuseStrip = 256;  // columns; 32 heads of them are 32 KB
constexpr int64_t kFuseLanes = 16;   // floats of the widest vector

// to[o][:] = sum_i coef[i * coef_in + o] * from[i][:], rows of `length` elements.
struct MixRows {
  const void* const* from;  // [num_in] rows
  void* const* to;          // [num_out] rows
  int64_t num_in, num_out;
  const float* coef;
  int64_t coef_in;
  int64_t length;
  Dtype dtype;
  bool stream;     // write past the caches: rows are 64-byte aligned and the output is large
  float* scratch;  // mix_scratch(num_in, num_out) floats, 64-byte aligned
};

// One (group, dim) of the backward.
struct FuseBackwardRows {
  const void* const* dout;  // [heads] rows
  const void* const* w;     // [heads] rows
  void* const* dw;          // [heads] rows, or null
  int64_t heads;
  const float* coef;  // [heads h][heads j] = omega[n, h, j, i]
  float* dots;        // [heads h][heads j] = domega[n, h, j, i], or null
  int64_t length;
  Dtype dtype;
  bool stream;
  float* scratch;  // backward_scratch(heads) floats, 64-byte aligned
};

constexpr int64_t mix_scratch(int64_t num_in, int64_t num_out) {
  return (num_in + num_out) * kFuseStrip;
}
constexpr int64_t backward_scratch(int64_t heads) {
  return 3 * heads * kFuseStrip + heads * heads * kFuseLanes;
}

TENFOLD_ISA_DECLARE(void mix_rows(const MixRows& p))
TENFOLD_ISA_DECLARE(void fuse_backward_rows(const FuseBackwardRows& p))

}  // namespace tenfold
