// SPDX-License-Identifier: Apache-2.0
// rms_norm and its gradients, over rows h [rows, cols]:
//
//   sum = x + residual, rounded to x's dtype; h = sum, or x where there is no residual
//   rstd = 1 / sqrt(mean(h^2) + eps)
//   y    = w (h rstd)
//   dh   = rstd (dy w - h rstd^2 mean(dy w h)) + dsum
//   dw   = sum over rows of dy h rstd
//
// Arithmetic is float32. y is rounded once, or, where models do, h rstd is rounded to y's dtype as
// well. Rows are contiguous and any distance apart, but for dx. dw is summed over blocks of rows
// whose size depends on nothing but the number of rows, then over the blocks in order.
//
// Traffic: x, residual read once, y, sum written once; dy, h, dsum read once, dx written once. A
// row is read twice, the second time from the caches.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

struct RmsRows {
  Dtype x_dtype, weight_dtype, y_dtype;
  bool rounds;  // h rstd
  bool past_caches;
  int64_t cols;
  float eps;
  const void *x, *residual, *weight;  // residual: or null
  void *y, *sum;                      // sum: null if residual is
  float* rstd;                        // [rows], or null
  int64_t x_stride, residual_stride, y_stride, sum_stride;
};

struct RmsGradRows {
  Dtype x_dtype, weight_dtype, y_dtype;
  bool past_caches;
  int64_t cols;
  const void *dy, *dsum, *h, *weight;  // dsum: or null
  const float* rstd;                   // [rows]
  void* dx;                            // or null
  int64_t dy_stride, dsum_stride, h_stride;
};

// How many rows are summed before their sums are added: few enough blocks that these cost little.
constexpr int64_t kRmsBlocks = 64, kRmsLeastRows = 16, kRmsRowsAtOnce = 4;
constexpr int64_t rms_block_rows(int64_t rows) {
  const int64_t even = (rows + kRmsBlocks - 1) / kRmsBlocks;
  const int64_t whole = (even + kRmsRowsAtOnce - 1) / kRmsRowsAtOnce * kRmsRowsAtOnce;
  return whole < kRmsLeastRows ? kRmsLeastRows : whole;
}

// Rows [begin, end). kept: kRmsRowsAtOnce rows of x's dtype, for past_caches with a residual.
TENFOLD_ISA_DECLARE_BF16(void rms_norm_rows(const RmsRows& r, int64_t begin, int64_t end,
                                            void* kept))
// Rows [begin, end), a block; dw: their sums [cols], or null.
TENFOLD_ISA_DECLARE_BF16(void rms_norm_grad_rows(const RmsGradRows& r, int64_t begin, int64_t end,
                                                 float* dw))
// Columns [begin, end) of the sum of `count` rows of `cols` floats.
TENFOLD_ISA_DECLARE_BF16(void rms_norm_add_blocks(const float* blocks, int64_t count, int64_t cols,
                                                  void* dw, Dtype dtype, int64_t begin,
                                                  int64_t end))

}  // namespace tenfold
