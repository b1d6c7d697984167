// SPDX-License-Identifier: Apache-2.0
// Device code of outer_dot (influence/outer_dot.h): a block per some examples of either side, as
// many as fill a tile, or one and one. Both products of a tile are made one after the other; the
// first waits in shared memory for the second to be multiplied with it, and warps sum up the pairs.
#pragma once

#include "core/tile_product.cuh"
#include "influence/outer_dot.h"

namespace tenfold::cuda {

// 80 KB with the products: two blocks on a multiprocessor of an H200, one where there are 99 KB.
template <class T>
using DotTile = ProductShape<T, 64, 128, 2, 4, 2>;
constexpr int kDotTileRows = 64, kDotTileCols = 128;

struct OuterDotArgs {
  TokenRows j, x, j2, x2;
  int64_t n, t, m, s, v, d;
  bool paired;
  bool v_vectors, d_vectors;  // rows of J and J2, X and X2 are whole, aligned 16-byte vectors
  float* out;
};

// Examples of a block.
struct DotGroups {
  int64_t rows, cols;  // of either side
  int64_t across;      // blocks along the second one
};

inline DotGroups dot_groups(const OuterDotArgs& a) {
  if (a.paired) return {1, 1, 1};
  const int64_t rows = a.t > 0 && a.t < kDotTileRows ? kDotTileRows / a.t : 1;
  const int64_t cols = a.s > 0 && a.s < kDotTileCols ? kDotTileCols / a.s : 1;
  return {rows, cols, (a.m + cols - 1) / cols};
}

inline int64_t dot_blocks(const OuterDotArgs& a) {
  const DotGroups g = dot_groups(a);
  return (a.n + g.rows - 1) / g.rows * g.across;
}

// Where the tokens of one side's tile start in both of its tensors; -1: there is no such token.
struct DotPlaces {
  int64_t *first, *second;

  __device__ void find(int count, int threads, int64_t token, int64_t tokens, int64_t each,
                       int64_t example, const TokenRows& one, const TokenRows& other) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
      const bool there = token + i < tokens;
      const int64_t at = example + (there ? (token + i) / each : 0);
      const int64_t in = there ? (token + i) % each : 0;
      first[i] = there ? at * one.example + in * one.token : -1;
      second[i] = there ? at * other.example + in * other.token : -1;
    }
  }
};

template <class P, class Finish>
__device__ inline void dot_product(char* memory, const void* left_data, const int64_t* left_at,
                                   const void* right_data, const int64_t* right_at, int64_t depth,
                                   bool vectors, const Finish& finish) {
  using T = typename P::T;
  const auto* const from = static_cast<const T*>(left_data);
  const auto* const by = static_cast<const T*>(right_data);
  const auto load = [&](int, int step, T* left, T* right) {
    const int64_t k = static_cast<int64_t>(step) * P::kDepth;
    load_operand<P, Lies::along, P::kRows>(left, from, depth - k, vectors, [&](int r) -> const T* {
      return left_at[r] >= 0 ? from + left_at[r] + k : nullptr;
    });
    load_operand<P, Lies::along, P::kCols>(right, by, depth - k, vectors, [&](int r) -> const T* {
      return right_at[r] >= 0 ? by + right_at[r] + k : nullptr;
    });
  };
  const int steps = static_cast<int>((depth + P::kDepth - 1) / P::kDepth);
  run_product<P, Lies::along, Lies::along>(
      memory, 1, steps, load, [&](int, const typename P::Sums& sums) {
#pragma unroll
        for (int m = 0; m < P::kM; ++m)
#pragma unroll
          for (int n = 0; n < P::kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              finish(
                  (P::first_row() + 16 * m + i / 2 * 8) * P::kCols + P::first_col() + 8 * n + i % 2,
                  sums[m][n][i]);
      });
}

// Adds the products of a tile to the scores of its pairs, or begins them.
__device__ inline void add_scores(const OuterDotArgs& a, const float* products, int64_t i,
                                  int64_t row, int64_t rows, int64_t k, int64_t col, int64_t cols,
                                  int warps) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t first_i = row / a.t, first_k = col / a.s;
  const auto down = static_cast<int>((row + rows - 1) / a.t - first_i + 1);
  const auto across = static_cast<int>((col + cols - 1) / a.s - first_k + 1);
  for (int pair = warp; pair < down * across; pair += warps) {
    const int64_t of_i = first_i + pair / across, of_k = first_k + pair % across;
    const auto inside = [](int64_t begin, int64_t from, int64_t count) {
      const int64_t at = begin - from;
      return static_cast<int>(at < 0 ? 0 : at < count ? at : count);
    };
    const int top = inside(of_i * a.t, row, rows), bottom = inside((of_i + 1) * a.t, row, rows);
    const int left = inside(of_k * a.s, col, cols), right = inside((of_k + 1) * a.s, col, cols);
    const int width = right - left;
    float sum = 0.0f;
    for (int e = lane; e < (bottom - top) * width; e += 32)
      sum += products[(top + e / width) * kDotTileCols + left + e % width];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (lane != 0) continue;
    float* const to = a.out + (a.paired ? i : (i + of_i) * a.m + k + of_k);
    *to = row == 0 && col == 0 ? sum : *to + sum;
  }
}

template <class T>
static __global__ void __launch_bounds__(DotTile<T>::kThreads, 2)
    outer_dot_kernel(OuterDotArgs a, DotGroups g) {
  using P = DotTile<T>;
  static_assert(P::kRows == kDotTileRows && P::kCols == kDotTileCols);
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int64_t, places, 2 * (P::kRows + P::kCols));
  float* const products = reinterpret_cast<float*>(memory + P::kBytes);
  const DotPlaces left{places, places + P::kRows};
  const DotPlaces right{places + 2 * P::kRows, places + 2 * P::kRows + P::kCols};
  const int64_t i = blockIdx.x / g.across * g.rows;
  const int64_t k = a.paired ? i : blockIdx.x % g.across * g.cols;
  const int64_t down = a.n - i < g.rows ? a.n - i : g.rows;
  const int64_t across = a.m - k < g.cols ? a.m - k : g.cols;
  const int64_t all_rows = down * a.t, all_cols = across * a.s;
  if (all_rows == 0 || all_cols == 0) {
    for (int64_t e = threadIdx.x; e < down * across; e += P::kThreads)
      a.out[a.paired ? i : (i + e / across) * a.m + k + e % across] = 0.0f;
    return;
  }
#pragma unroll 1
  for (int64_t row = 0; row < all_rows; row += P::kRows)
#pragma unroll 1
    for (int64_t col = 0; col < all_cols; col += P::kCols) {
      __syncthreads();  // the last tile's places and products have been read
      left.find(P::kRows, P::kThreads, row, all_rows, a.t, i, a.j, a.x);
      right.find(P::kCols, P::kThreads, col, all_cols, a.s, k, a.j2, a.x2);
      __syncthreads();
      dot_product<P>(memory, a.j.data, left.first, a.j2.data, right.first, a.v, a.v_vectors,
                     [&](int at, float sum) { products[at] = sum; });
      __syncthreads();  // the stages have been read
      dot_product<P>(memory, a.x.data, left.second, a.x2.data, right.second, a.d, a.d_vectors,
                     [&](int at, float sum) { products[at] *= sum; });
      __syncthreads();
      add_scores(a, products, i, row, all_rows - row < P::kRows ? all_rows - row : P::kRows, k, col,
                 all_cols - col < P::kCols ? all_cols - col : P::kCols, P::kThreads / 32);
    }
}

template <class T>
void launch_outer_dot(const OuterDotArgs& a, cudaStream_t stream) {
  using P = DotTile<T>;
  constexpr int kBytes = P::kBytes + P::kRows * P::kCols * static_cast<int>(sizeof(float));
  const auto blocks = static_cast<unsigned>(dot_blocks(a));
  if (blocks > 0)
    TENFOLD_LAUNCH_SHARED(outer_dot_kernel<T>, blocks, P::kThreads, kBytes, kBytes, stream, a,
                          dot_groups(a));
}

}  // namespace tenfold::cuda
