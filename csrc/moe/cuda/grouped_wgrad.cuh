// SPDX-License-Identifier: Apache-2.0
// Weight gradients of grouped products: dy^T a over the rows of a group. A tile of the result has
// one owner, which adds up all rows of its group in order; a group without rows gives zeros.
#pragma once

#include "moe/cuda/grouped_product.cuh"

namespace tenfold::cuda {

struct WgradArgs {
  RowGroups groups;
  ProductRows dy, a;  // `vectors` of whole rows of them
  int64_t dy_cols, a_cols;
  unsigned row_tiles, col_tiles;
  void* out;  // [groups][dy_cols][a_cols]
  bool twos;
};

// Which rows the steps of depth take, a step ahead: threads [0, kDepth) read those of dy, the next
// those of a.
template <class P>
struct WgradRows {
  const WgradArgs& args;
  int64_t first, end;
  int* rows;  // shared [2 steps][dy, a][kDepth]
  int ahead = -1;

  __device__ static bool reads() { return threadIdx.x < 2 * P::kDepth; }
  __device__ int source(int step) const {
    const int64_t at =
        first + static_cast<int64_t>(step) * P::kDepth + static_cast<int>(threadIdx.x) % P::kDepth;
    if (at >= end) return -1;
    return static_cast<int>(threadIdx.x) < P::kDepth ? args.dy.source(at) : args.a.source(at);
  }
  __device__ void put(int step, int row) const {
    if (reads()) rows[step % 2 * 2 * P::kDepth + threadIdx.x] = row;
  }
  __device__ void start() {
    if (!reads()) return;
    put(0, source(0));
    ahead = source(1);
  }
  // After the barrier of the step before: what the step after `step` reads, and the one then.
  __device__ void advance(int step) {
    put(step + 1, ahead);
    if (reads()) ahead = source(step + 2);
  }
  __device__ const int* of(int step, int operand) const {
    return rows + (step % 2 * 2 + operand) * P::kDepth;
  }
};

template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads, 1) grouped_wgrad_kernel(WgradArgs a) {
  using P = ProductTile<T>;
  static_assert(P::kStages == 2 && 2 * P::kDepth <= P::kThreads);
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int, shared_rows, 4 * P::kDepth);
  const unsigned tiles = a.row_tiles * a.col_tiles;
  const int64_t group = blockIdx.x / tiles;
  const TilePlace place = tile_place(blockIdx.x % tiles, a.row_tiles, a.col_tiles);
  const int64_t row0 = place.row * P::kRows, col = place.col * P::kCols;
  WgradRows<P> rows{a, a.groups.bound(group), a.groups.bound(group + 1), shared_rows};
  rows.start();
  __syncthreads();
  const auto* const dy = static_cast<const T*>(a.dy.data);
  const auto* const right_data = static_cast<const T*>(a.a.data);
  const auto load = [&](int, int step, T* left, T* right) {
    const int *const of_dy = rows.of(step, 0), *const of_a = rows.of(step, 1);
    load_operand<P, Lies::across, P::kRows>(
        left, dy, a.dy_cols - row0, a.dy.vectors, [&](int r) -> const T* {
          return of_dy[r] >= 0 ? dy + of_dy[r] * a.dy.stride + row0 : nullptr;
        });
    load_operand<P, Lies::across, P::kCols>(
        right, right_data, a.a_cols - col, a.a.vectors, [&](int r) -> const T* {
          return of_a[r] >= 0 ? right_data + of_a[r] * a.a.stride + col : nullptr;
        });
    rows.advance(step);
  };
  const auto finish = [&](int, typename P::Sums& sums) {
    T* const out = static_cast<T*>(a.out) + group * a.dy_cols * a.a_cols;
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t r = row0 + P::first_row() + 16 * m + 8 * half;
        if (r >= a.dy_cols) continue;
#pragma unroll
        for (int n = 0; n < P::kN; ++n) {
          const int64_t c = col + P::first_col() + 8 * n;
          if (c >= a.a_cols) break;
          const float x[2] = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
          put_two(out + r * a.a_cols + c, x, c + 1 < a.a_cols, a.twos);
        }
      }
  };
  const int64_t length = rows.end - rows.first;
  run_product<P, Lies::across, Lies::across>(memory, 1, length > 0 ? steps_of<P>(length) : 0, load,
                                             finish);
}

}  // namespace tenfold::cuda
