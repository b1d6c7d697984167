// SPDX-License-Identifier: Apache-2.0
// Tiles of logits of linear_cross_entropy: the rows of hidden that count times the vocabulary.
#pragma once

#include "core/tile_product.cuh"
#include "loss/cuda/lce_rows_kernel.cuh"

namespace tenfold::cuda {

struct LceMatrices {
  const void *hidden, *weight;
  int64_t hidden_stride, weight_stride;
  int64_t dim, vocab;
  bool hidden_vectors, weight_vectors;  // rows are whole, aligned 16-byte vectors
  float softcap, scale;                 // 0: none; 1 / temperature
};

template <class T>
__device__ inline int depth_steps(int64_t depth) {
  return static_cast<int>((depth + ProductTile<T>::kDepth - 1) / ProductTile<T>::kDepth);
}

// A softcap, and its slope from an exponential: 1 - tanh^2 has no digits left where it saturates.
__device__ inline float capped(float x, float softcap) {
  return softcap * tanhf(x / softcap);
}

__device__ inline float cap_slope(float x, float softcap) {
  const float e = fast_exp2(-2.0f * kLog2E * fabsf(x / softcap)), sum = 1.0f + e;
  return 4.0f * e / (sum * sum);
}

// From the thread's first column of the tile at v on: how many tokens there are, at most a tile.
template <class T>
__device__ inline int columns_inside(const LceMatrices& a, int64_t v) {
  using P = ProductTile<T>;
  return static_cast<int>(a.vocab - v < P::kCols ? a.vocab - v : P::kCols) - P::first_col();
}

// Products of the rows `rows` of hidden (-1: none) with `tiles` tiles of the vocabulary from v on,
// 0 beyond it: use(v of the tile, sums).
template <class T, class Use>
__device__ inline void for_logits(const LceMatrices& a, const int* rows, int64_t v, int tiles,
                                  char* memory, const Use& use) {
  using P = ProductTile<T>;
  const auto* const hidden = static_cast<const T*>(a.hidden);
  const auto* const weight = static_cast<const T*>(a.weight);
  const auto load = [&](int tile, int step, T* left, T* right) {
    const int64_t k = static_cast<int64_t>(step) * P::kDepth;
    load_operand<P, Lies::along, P::kRows>(
        left, hidden, a.dim - k, a.hidden_vectors, [&](int r) -> const T* {
          return rows[r] >= 0 ? hidden + rows[r] * a.hidden_stride + k : nullptr;
        });
    const int64_t first = v + static_cast<int64_t>(tile) * P::kCols;
    load_operand<P, Lies::along, P::kCols>(
        right, weight, a.dim - k, a.weight_vectors, [&](int r) -> const T* {
          return first + r < a.vocab ? weight + (first + r) * a.weight_stride + k : nullptr;
        });
  };
  run_product<P, Lies::along, Lies::along>(
      memory, tiles, depth_steps<T>(a.dim), load,
      [&](int tile, typename P::Sums& x) { use(v + static_cast<int64_t>(tile) * P::kCols, x); });
}

// Rows of hidden of a tile of those that count.
template <class T>
__device__ inline void load_row_tile(const PackedRows& rows, int64_t first, int* row) {
  const int64_t count = rows.state->count;
  for (int i = threadIdx.x; i < ProductTile<T>::kRows; i += ProductTile<T>::kThreads)
    row[i] = first + i < count ? rows.row[first + i] : -1;
}

// Where the target of a row is among the thread's columns of the tile at v, 8 n + i; else -1.
template <class T>
__device__ inline int chosen_column(int target, int64_t v) {
  using P = ProductTile<T>;
  // Both are below 2^31: a target before the columns of the thread, as -1, wraps to a large number.
  const auto at = static_cast<unsigned>(target) - static_cast<unsigned>(v) -
                  static_cast<unsigned>(P::first_col());
  return at < 8 * P::kN && at % 8 < 2 ? static_cast<int>(at) : -1;
}

}  // namespace tenfold::cuda
