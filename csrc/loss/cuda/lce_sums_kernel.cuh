// SPDX-License-Identifier: Apache-2.0
// The forward pass of linear_cross_entropy: sums over ranges of the vocabulary of logits that are
// gone with their tile.
#pragma once

#include "loss/cuda/lce_logits.cuh"

namespace tenfold::cuda {

// What a thread has seen of a row: relative to `max`, weighted by log2 of exp.
struct RunningSums {
  float max, sum, weighted;
};

template <bool kWeighted>
__device__ inline void move_to(RunningSums* a, float max, float factor) {
  const float d = (a->max - max) * factor, by = fast_exp2(d);
  if constexpr (kWeighted) a->weighted = fmaf(a->sum, fmaxf(d, kZeroExponent), a->weighted) * by;
  a->sum *= by;
  a->max = max;
}

template <bool kWeighted>
__device__ inline void join_running(RunningSums* a, RunningSums b, float factor) {
  const float max = fmaxf(a->max, b.max);
  move_to<kWeighted>(a, max, factor);
  move_to<kWeighted>(&b, max, factor);
  a->sum += b.sum;
  if constexpr (kWeighted) a->weighted += b.weighted;
}

struct LceSumsArgs {
  LceMatrices m;
  PackedRows rows;
  int64_t first;  // of the rows that count
  int row_tiles, ranges;
  int tiles_of_range;
  RangeSums* parts;  // [rows from first][ranges]
};

// Logits of a tile at v of their products; -inf beyond the vocabulary.
template <class T, bool kCapped>
__device__ inline void products_to_logits(const LceMatrices& a, int64_t v,
                                          typename ProductTile<T>::Sums& x) {
  using P = ProductTile<T>;
  if (kCapped && a.softcap > 0.0f) {  // always so, but then ptxas does not spill
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int n = 0; n < P::kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][n][i] = capped(x[m][n][i], a.softcap);
  }
  if (v + P::kCols <= a.vocab) return;
  const int inside = columns_inside<T>(a, v);
#pragma unroll
  for (int n = 0; n < P::kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int m = 0; m < P::kM; ++m)
        if (8 * n + i % 2 >= inside) x[m][n][i] = -INFINITY;
}

// A block: a tile of rows, a range of the vocabulary. Neighbours share the range: it is read once.
// kCapped: with a softcap; kWeighted: for an entropy. Parameters because of their registers.
template <class T, bool kCapped, bool kWeighted>
__global__ void __launch_bounds__(ProductTile<T>::kThreads, 1) lce_sums_kernel(LceSumsArgs a) {
  using P = ProductTile<T>;
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int, row, P::kRows);
  TENFOLD_SHARED(int, target, P::kRows);
  const int64_t tile = blockIdx.x % static_cast<unsigned>(a.row_tiles);
  const int range = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.row_tiles));
  const int64_t first = a.first + tile * P::kRows, count = a.rows.state->count;
  if (first >= count) return;
  load_row_tile<T>(a.rows, first, row);
  for (int i = threadIdx.x; i < P::kRows; i += P::kThreads)
    target[i] = first + i < count ? a.rows.target[first + i] : -1;
  __syncthreads();
  const int all_tiles = static_cast<int>((a.m.vocab + P::kCols - 1) / P::kCols);
  const int first_tile = range * a.tiles_of_range;
  const int tiles =
      all_tiles - first_tile < a.tiles_of_range ? all_tiles - first_tile : a.tiles_of_range;
  const float factor = a.m.scale * kLog2E;
  RunningSums seen[P::kM][2];
#pragma unroll
  for (int m = 0; m < P::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) seen[m][half] = {kLowestFloat, 0.0f, 0.0f};
  const int row0 = P::first_row();
  const auto use = [&](int64_t v, typename P::Sums& x) {
    products_to_logits<T, kCapped>(a.m, v, x);
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RunningSums& s = seen[m][half];
        float max = s.max;
#pragma unroll
        for (int n = 0; n < P::kN; ++n)
          max = fmaxf(max, fmaxf(x[m][n][2 * half], x[m][n][2 * half + 1]));
        move_to<kWeighted>(&s, max, factor);
#pragma unroll
        for (int n = 0; n < P::kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float d = (x[m][n][2 * half + i] - max) * factor, e = fast_exp2(d);
            s.sum += e;
            if constexpr (kWeighted) s.weighted = fmaf(fmaxf(d, kZeroExponent), e, s.weighted);
          }
        const int at = row0 + 16 * m + 8 * half;
        const int chosen = chosen_column<T>(target[at], v);
        if (chosen < 0) continue;
#pragma unroll
        for (int n = 0; n < P::kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (chosen == 8 * n + i) a.rows.chosen[first + at] = x[m][n][2 * half + i];
      }
  };
  for_logits<T>(a.m, row, static_cast<int64_t>(first_tile) * P::kCols, tiles, memory, use);
  // Four lanes have a row, and kWarpsAcross warps.
  __syncthreads();
  auto* const parts = reinterpret_cast<RunningSums*>(memory);  // [kWarpsAcross][kRows]
#pragma unroll
  for (int m = 0; m < P::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RunningSums s = seen[m][half];
      for (int step = 1; step < 4; step *= 2) {
        const float max = __shfl_xor_sync(0xFFFFFFFFu, s.max, step);
        const float sum = __shfl_xor_sync(0xFFFFFFFFu, s.sum, step);
        const float weighted = __shfl_xor_sync(0xFFFFFFFFu, s.weighted, step);
        join_running<kWeighted>(&s, {max, sum, weighted}, factor);
      }
      if (threadIdx.x % 4 == 0)
        parts[P::warp_col() / (8 * P::kN) * P::kRows + row0 + 16 * m + 8 * half] = s;
    }
  __syncthreads();
  const int r = threadIdx.x;
  if (r >= P::kRows || row[r] < 0) return;
  RunningSums all = parts[r];
  for (int w = 1; w < P::kWarpsAcross; ++w)
    join_running<kWeighted>(&all, parts[w * P::kRows + r], factor);
  a.parts[(tile * P::kRows + r) * a.ranges + range] = {all.max, all.sum,
                                                       all.weighted * static_cast<float>(kLn2)};
}

}  // namespace tenfold::cuda
