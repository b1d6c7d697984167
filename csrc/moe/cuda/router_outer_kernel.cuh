// SPDX-License-Identifier: Apache-2.0
// Device code of the two products of moe_gate_linear's backward, which are one: out[r][c] = sum
// over i of a[r a_row + i a_step] b[i][c], of the router's rows for the gradient of x, of x's for
// that of the router. a, the gradient of the logits, is small: a block brings kOuterRows rows of it
// to shared memory, and its threads, kOuterUnit columns each, read b once. A depth of more than
// kOuterStrip is cut into strips, whose sums are added by sum_parts.
#pragma once

#include "core/vectors.cuh"
#include "moe/gate_linear.h"

namespace tenfold::cuda {

constexpr int kOuterThreads = 128, kOuterRows = 16, kOuterUnit = 4, kOuterStage = 32;
constexpr int64_t kOuterColumns = kOuterThreads * kOuterUnit;

struct OuterArgs {
  const float* a;
  int64_t a_row, a_step, rows, depth;
  const void* b;
  int64_t b_stride, cols;
  bool b_wide, out_wide;
  int64_t strip;                 // depth of a block
  int64_t row_tiles, col_tiles;  // of a strip
  void* out;                     // [strips, rows, cols]
};

template <class B, class Out>
OuterArgs with_tiles(OuterArgs a) {
  a.b_wide = wide_rows<B, kOuterUnit>(a.b, a.b_stride, a.cols);
  a.out_wide = wide_rows<Out, kOuterUnit>(a.out, a.cols, a.cols);
  a.row_tiles = (a.rows + kOuterRows - 1) / kOuterRows;
  a.col_tiles = (a.cols + kOuterColumns - 1) / kOuterColumns;
  return a;
}

inline int64_t outer_strips(const OuterArgs& a) {
  return (a.depth + a.strip - 1) / a.strip;
}

template <class B, class Out>
__global__ void __launch_bounds__(kOuterThreads, 3) router_outer_kernel(OuterArgs a) {
  TENFOLD_SHARED(float, left, kOuterStage* kOuterRows);
  const int64_t tile = blockIdx.x / a.col_tiles, strip = tile / a.row_tiles;
  const int64_t row = tile % a.row_tiles * kOuterRows;
  const int64_t c = blockIdx.x % a.col_tiles * kOuterColumns + threadIdx.x * kOuterUnit;
  const int64_t begin = strip * a.strip;
  const int64_t end = begin + a.strip < a.depth ? begin + a.strip : a.depth;
  const int width = static_cast<int>(c >= a.cols               ? 0
                                     : a.cols - c < kOuterUnit ? a.cols - c
                                                               : kOuterUnit);
  const B* from = static_cast<const B*>(a.b) + begin * a.b_stride + c;
  float sums[kOuterRows][kOuterUnit] = {};
  for (int64_t first = begin; first < end; first += kOuterStage) {
    for (int j = threadIdx.x; j < kOuterStage * kOuterRows; j += kOuterThreads) {
      const int64_t i = first + j / kOuterRows, r = row + j % kOuterRows;
      left[j] = i < end && r < a.rows ? a.a[r * a.a_row + i * a.a_step] : 0.0f;
    }
    __syncthreads();
    constexpr int kTogether = 4;  // rows of b under way
#pragma unroll 1
    for (int j = 0; j < kOuterStage; j += kTogether) {
      float b[kTogether][kOuterUnit];
#pragma unroll
      for (int l = 0; l < kTogether; ++l, from += a.b_stride)
        load_some(from, first + j + l < end ? width : 0, a.b_wide, b[l]);
#pragma unroll
      for (int l = 0; l < kTogether; ++l)
#pragma unroll
        for (int r = 0; r < kOuterRows; r += 4) {
          float x[4];
          load_some(left + (j + l) * kOuterRows + r, 4, true, x);
#pragma unroll
          for (int q = 0; q < 4; ++q)
#pragma unroll
            for (int u = 0; u < kOuterUnit; ++u)
              sums[r + q][u] = fmaf(x[q], b[l][u], sums[r + q][u]);
        }
    }
    __syncthreads();
  }
  if (c >= a.cols) return;
  Out* const out = static_cast<Out*>(a.out) + strip * a.rows * a.cols;
#pragma unroll
  for (int r = 0; r < kOuterRows; ++r)
    if (row + r < a.rows) store_some(sums[r], out + (row + r) * a.cols + c, a.cols - c, a.out_wide);
}

inline int64_t outer_blocks(const OuterArgs& a) {
  return outer_strips(a) * a.row_tiles * a.col_tiles;
}

template <class B, class Out>
void launch_outer(const OuterArgs& a, cudaStream_t stream) {  // of with_tiles
  const int64_t blocks = outer_blocks(a);
  if (blocks > 0)
    TENFOLD_LAUNCH((router_outer_kernel<B, Out>), static_cast<unsigned>(blocks), kOuterThreads,
                   stream, a);
}

}  // namespace tenfold::cuda
