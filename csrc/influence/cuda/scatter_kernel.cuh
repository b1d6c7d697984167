// SPDX-License-Identifier: Apache-2.0
// Sums of rows that entries add to rows by their ids, in the order of the entries and without
// atomics: out[plane, id, :] = sum over entries e of that id of value(e, plane, :).
//
// A block owns kScatterIds rows of a plane in 32 columns, whose sums lie in its shared memory; each
// of its warps owns some of the rows. All warps walk over the ids of all entries, and the owner of
// an id adds the entry's values, a column a lane. Nobody else touches those sums: no barriers.
#pragma once

#include "influence/cuda/rows.cuh"

namespace tenfold::cuda {

constexpr int kScatterThreads = 256, kScatterWarps = kScatterThreads / 32;
constexpr int kScatterAhead = 4;  // ids of a lane, and values of an entry, that are on their way
// Fill 48 KB, what a kernel has without asking.
template <class R>
constexpr int kScatterIds = 48 * 1024 / 32 / static_cast<int>(sizeof(R));

struct ScatterShape {
  int64_t planes, rows, cols, entries;
};

template <class T>
inline int64_t scatter_blocks(const ScatterShape& s) {
  constexpr int64_t kIds = kScatterIds<Real<T>>;
  return s.planes * ((s.cols + 31) / 32) * ((s.rows + kIds - 1) / kIds);
}

// Position of the lowest set bit of x > 0.
__device__ inline int lowest_of(unsigned x) {
  return __popc((x & (0u - x)) - 1u);
}

// source.id(entry): a row, or -1; source.value(entry, plane, col).
template <class T, class Source>
static __global__ void __launch_bounds__(kScatterThreads)
    scatter_kernel(Source source, ScatterShape s, T* out) {
  using R = Real<T>;
  constexpr int kIds = kScatterIds<R>;
  TENFOLD_SHARED(R, sums, kIds * 32);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t col_tiles = (s.cols + 31) / 32, parts = (s.rows + kIds - 1) / kIds;
  const int64_t part = blockIdx.x % parts, tile = blockIdx.x / parts;
  const int64_t plane = tile / col_tiles, col = tile % col_tiles * 32 + lane;
  const int64_t base = part * kIds;
  const int here = static_cast<int>(s.rows - base < kIds ? s.rows - base : kIds);
  for (int i = warp; i < here; i += kScatterWarps) sums[i * 32 + lane] = R{0};
  for (int64_t first = 0; first < s.entries; first += 32 * kScatterAhead) {
    int local[kScatterAhead];
#pragma unroll
    for (int a = 0; a < kScatterAhead; ++a) {
      const int64_t e = first + 32 * a + lane;
      const int64_t i = e < s.entries ? source.id(e) - base : -1;
      local[a] = i >= 0 && i < here ? static_cast<int>(i) : -1;
    }
#pragma unroll
    for (int a = 0; a < kScatterAhead; ++a) {
      const bool mine = local[a] >= 0 && local[a] % kScatterWarps == warp;
      unsigned left = __ballot_sync(0xFFFFFFFFu, mine);
      while (left != 0) {
        int row[kScatterAhead];
        R value[kScatterAhead] = {};
#pragma unroll
        for (int k = 0; k < kScatterAhead; ++k) {
          row[k] = -1;
          if (left == 0) continue;
          const int from = lowest_of(left);
          left &= left - 1;
          row[k] = __shfl_sync(0xFFFFFFFFu, local[a], from);
          value[k] = col < s.cols ? source.value(first + 32 * a + from, plane, col) : R{0};
        }
#pragma unroll
        for (int k = 0; k < kScatterAhead; ++k)
          if (row[k] >= 0) sums[row[k] * 32 + lane] += value[k];
      }
    }
  }
  if (col >= s.cols) return;
  for (int i = warp; i < here; i += kScatterWarps)
    narrow(sums[i * 32 + lane], out + (plane * s.rows + base + i) * s.cols + col);
}

template <class T, class Source>
void launch_scatter(const Source& source, const ScatterShape& s, T* out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(scatter_blocks<T>(s));
  if (blocks > 0)
    TENFOLD_LAUNCH((scatter_kernel<T, Source>), blocks, kScatterThreads, stream, source, s, out);
}

}  // namespace tenfold::cuda
