// SPDX-License-Identifier: Apache-2.0
// Products of groups of rows (the sorted slots of an expert) with a matrix each, a block per tile.
// The groups' sizes are known to the device only: grids are made for the most tiles that so many
// rows can need, a block finds its rows in `offsets`, and blocks beyond the last tile leave. Rows
// of the left operand may be gathered; what follows the product takes the sums from registers.
#pragma once

#include "core/tile_product.cuh"

namespace tenfold::cuda {

// Rows [offsets[i], offsets[i + 1]) are those of group i; all of them of one, if there are none.
struct RowGroups {
  IntArray offsets;
  int64_t count, rows;

  __device__ int64_t bound(int64_t i) const {  // never outside, whatever the offsets say
    const int64_t at = offsets.given() ? offsets[i] : i * rows;
    return at < 0 ? 0 : at < rows ? at : rows;
  }
};

// Row i is that of gather[i], if it is in [0, limit) (else zeros), or i.
struct ProductRows {
  const void* data;
  int64_t stride;
  bool vectors;  // rows are whole, aligned 16-byte vectors
  IntArray gather;
  int64_t limit;

  __device__ int source(int64_t i) const {
    if (!gather.given()) return static_cast<int>(i);
    const int64_t row = gather[i];
    return row >= 0 && row < limit ? static_cast<int>(row) : -1;
  }
};

// A matrix of each group, in two parts: rows from `split` on are those of the second.
struct ProductMatrices {
  const void* data[2];
  int64_t group_stride[2], stride[2];
  int64_t split;
  bool vectors;

  template <class T>
  __device__ const T* row(int64_t group, int64_t i) const {
    const int part = i >= split ? 1 : 0;
    return static_cast<const T*>(data[part]) + group * group_stride[part] +
           (i - part * split) * stride[part];
  }
};

struct RowTile {
  int64_t group, first;  // group -1: rows of none
  int rows;
};

// Tile number `tile` of those of all groups, kRows rows or the rest of a group each; `rest`: then
// the rows of none. The warps of a block all find the same. False: beyond the last one.
template <int kRows>
__device__ inline bool find_rows(const RowGroups& g, int64_t tile, bool rest, RowTile* out) {
  const int lane = threadIdx.x % 32;
  const auto take = [&](int64_t group, int64_t first, int64_t end) {
    *out = {group, first, static_cast<int>(end - first < kRows ? end - first : kRows)};
    return first < end;
  };
  for (int64_t i = 0; i < g.count; i += 32) {
    const bool some = i + lane < g.count;
    const int64_t first = some ? g.bound(i + lane) : 0, end = some ? g.bound(i + lane + 1) : 0;
    const int tiles = end > first ? static_cast<int>((end - first + kRows - 1) / kRows) : 0;
    int up_to = tiles;  // of the lanes before and this one
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_sync(0xFFFFFFFFu, up_to, lane >= step ? lane - step : lane);
      if (lane >= step) up_to += other;
    }
    const uint32_t mine = __ballot_sync(0xFFFFFFFFu, tile < up_to && tile >= up_to - tiles);
    const int all = __shfl_sync(0xFFFFFFFFu, up_to, 31);
    if (mine != 0) {  // one lane's
      const int from = __popc(mine - 1);
      const int64_t start = first + (tile - (up_to - tiles)) * kRows;
      return take(i + from, __shfl_sync(0xFFFFFFFFu, start, from),
                  __shfl_sync(0xFFFFFFFFu, end, from));
    }
    tile -= all;
  }
  return rest && take(-1, g.bound(g.count) + tile * kRows, g.rows);
}

// Neighbouring blocks take 16 tiles of rows times a few of columns: both stay in the second cache.
struct TilePlace {
  int64_t row, col;
};

__device__ inline TilePlace tile_place(unsigned block, unsigned row_tiles, unsigned col_tiles) {
  constexpr unsigned kTogether = 16;
  const unsigned first = block / (kTogether * col_tiles) * kTogether;
  const unsigned left = row_tiles - first, rows = left < kTogether ? left : kTogether;
  block -= first * col_tiles;
  return {first + block % rows, block / rows};
}

template <class P>
__device__ inline int steps_of(int64_t depth) {
  return static_cast<int>((depth + P::kDepth - 1) / P::kDepth);
}

template <class Finish>
struct GroupedArgs {
  RowGroups groups;
  ProductRows left;
  ProductMatrices right;
  int64_t depth, cols;
  // Pairs only. 2: `depth` columns of the left for the first part of the right, the next for the
  // second.
  int phases;
  bool rest;  // zeros to rows of no group
  unsigned row_tiles, col_tiles;
  Finish finish;
};

// kRight: a row of the matrices is a column of the product, or a step of its depth. kPairs: a tile
// has columns of both parts, `cols` each; of 16 the first 8 are the first part's, so that a thread
// gets both sums of a column.
template <class P, Lies kRight, bool kPairs, class Finish>
__global__ void __launch_bounds__(P::kThreads, P::kThreads > 128 ? 1 : 2)
    grouped_product_kernel(GroupedArgs<Finish> a) {
  using T = typename P::T;
  static_assert(!kPairs || kRight == Lies::along);
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int, row, P::kRows);
  const TilePlace place = tile_place(blockIdx.x, a.row_tiles, a.col_tiles);
  RowTile rows;
  if (!find_rows<P::kRows>(a.groups, place.row, a.rest, &rows)) return;
  const int64_t col = place.col * (kPairs ? P::kCols / 2 : P::kCols);
  for (int i = threadIdx.x; i < P::kRows; i += P::kThreads)
    row[i] = i < rows.rows ? a.left.source(rows.first + i) : -1;
  __syncthreads();
  const auto* const left_data = static_cast<const T*>(a.left.data);
  const auto* const right_data = static_cast<const T*>(a.right.data[0]);
  const int each = steps_of<P>(a.depth);
  const auto load = [&](int, int step, T* left, T* right) {
    const int phase = kPairs && step >= each ? 1 : 0;
    const int64_t k = static_cast<int64_t>(step - phase * each) * P::kDepth;
    const T* const from = left_data + phase * a.depth + k;
    load_operand<P, Lies::along, P::kRows>(
        left, left_data, a.depth - k, a.left.vectors,
        [&](int r) -> const T* { return row[r] >= 0 ? from + row[r] * a.left.stride : nullptr; });
    if constexpr (kPairs) {
      load_operand<P, Lies::along, P::kCols>(
          right, right_data, a.depth - k, a.right.vectors, [&](int r) -> const T* {
            const int part = r / 8 % 2;
            const int64_t c = col + r / 16 * 8 + r % 8;
            if (c >= a.cols || (a.phases == 2 && part != phase)) return nullptr;
            return a.right.template row<T>(rows.group, part * a.right.split + c) + k;
          });
    } else if constexpr (kRight == Lies::along) {
      load_operand<P, Lies::along, P::kCols>(
          right, right_data, a.depth - k, a.right.vectors, [&](int r) -> const T* {
            return col + r < a.cols ? a.right.template row<T>(rows.group, col + r) + k : nullptr;
          });
    } else {
      load_operand<P, Lies::across, P::kCols>(
          right, right_data, a.cols - col, a.right.vectors, [&](int r) -> const T* {
            return k + r < a.depth ? a.right.template row<T>(rows.group, k + r) + col : nullptr;
          });
    }
  };
  run_product<P, Lies::along, kRight>(
      memory, 1, rows.group < 0 ? 0 : each * a.phases, load,
      [&](int, typename P::Sums& sums) { a.finish.template store<P>(rows, col, a.cols, sums); });
}

// One or two neighbours of a row.
template <class T>
__device__ inline void put_two(T* to, const float (&x)[2], bool both, bool at_once) {
  if (both && at_once) return store_two(to, x[0], x[1]);
  from_float(x[0], to);
  if (both) from_float(x[1], to + 1);
}

// Rows factor (scale sums), of T or `wide`: float32. A factor per row (by position), or 1.
template <class T>
struct StoreRows {
  void* out;
  int64_t stride;
  bool wide;
  bool twos;  // two neighbours from an even column on may be stored at once
  float scale;
  const float* factor;

  template <class P>
  __device__ void store(const RowTile& rows, int64_t col, int64_t cols,
                        const typename P::Sums& sums) const {
    for_rows<P>(sums, [&](int r, const float (&products)[P::kN][2]) {
      if (r >= rows.rows) return;
      const int64_t position = rows.first + r;
      const float by = factor != nullptr ? scale * factor[position] : scale;
#pragma unroll
      for (int n = 0; n < P::kN; ++n) {
        const int64_t c = col + P::first_col() + 8 * n, at = position * stride + c;
        if (c >= cols) break;
        const float x[2] = {products[n][0] * by, products[n][1] * by};
        const bool both = c + 1 < cols;
        if (wide) {
          put_two(static_cast<float*>(out) + at, x, both, twos);
        } else {
          put_two(static_cast<T*>(out) + at, x, both, twos);
        }
      }
    });
  }
};

}  // namespace tenfold::cuda
