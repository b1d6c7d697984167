// SPDX-License-Identifier: Apache-2.0
// Device code of the backward of dha_attention: three kernels of one shape. A block owns a tile of
// rows of one gradient and walks over the other side, so there are no atomics and the order of
// additions is fixed:
//   dQ: rows are queries of one query head, the other side its keys and values;
//   dK: rows are keys of one key head, the other side queries and dout of every query head that
//       reads it, one after the other; dV: likewise of a value head. The groups of the two maps
//       differ, so dK and dV have owners of their own and both make the weights again.
// Per tile: x = own rows . other rows^T (logits), y = own . other (products of dout and v),
// weights from x and lse, ds = weights * (y - delta), gradient += ds . other rows.
// delta_i = dout_i . out_i - dlse_i is made before, by the first kernel.
#pragma once

#include "attention/cuda/dropout.cuh"
#include "attention/cuda/prefill_launch.h"

namespace tenfold::cuda {

// A warp owns 16 kM rows.
template <class T, int kWidth>
struct BackwardTile {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kW = kWidth;
  static constexpr int kM = kHalf && kW <= 128 ? 2 : 1;
  static constexpr int kWarps = !kHalf && kW == 256 ? 2 : 4;
  static constexpr int kCols = !kHalf ? 16 : kW == 64 ? 64 : 32;  // rows of the other side
  static constexpr int kStages = kHalf && kW <= 128 ? 2 : 1;
  static constexpr int kN = kCols / 8, kRows = 16 * kM * kWarps, kThreads = 32 * kWarps;
  static constexpr int kScratch = kWeightScratch<T, kM, kN>;
  static constexpr int kBytes =
      (2 * kRows + 2 * kStages * kCols) * kW * static_cast<int>(sizeof(T)) +
      kWarps * kScratch * static_cast<int>(sizeof(float));
  static constexpr int kWindow = kRows + kCols;  // floats of a window, of which each stage has one
  // What the kernel declares besides, each from a multiple of 16 bytes on: 99 KB are what every
  // device from sm_80 on has.
  static constexpr int kQueries = kRows > kStages* kCols ? kRows : kStages * kCols;
  static constexpr int kDeclared = 2 * 16 + 4 * (2 * kQueries + kStages * kWindow);
  static_assert(kBytes + kDeclared <= 99 * 1024);
};

template <class T>
__global__ void __launch_bounds__(128) dha_delta_kernel(BackwardArgs p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const int64_t batch = p.queries.cu.given() ? 1 : p.batch;
  if (row >= batch * p.q_heads * p.queries.length) return;
  const int64_t i = row % p.queries.length, rest = row / p.queries.length;
  const int64_t h = rest % p.q_heads, b = rest / p.q_heads;
  const T* out = row_at<T>(p.out, p.out_at, b, h, i);
  const T* dout = row_at<T>(p.dout, p.dout_at, b, h, i);
  float sum = 0.0f;
  for (int64_t d = threadIdx.x % 32; d < p.value_dim; d += 32)
    sum = fmaf(to_float(out[d]), to_float(dout[d]), sum);
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (threadIdx.x % 32 == 0) p.delta[row] = p.dlse != nullptr ? sum - p.dlse[row] : sum;
}

template <class T, int kW, Grad kGrad, bool kT5>
struct BackwardBlock {
  using C = BackwardTile<T, kW>;
  using Units = SoftmaxUnits<T>;
  static constexpr bool kOwnsQueries = kGrad == Grad::q;
  const BackwardArgs& p;
  int64_t b, row0;  // of the block's rows in their sequence
  int rows;         // that exist
  Rows qs, ks;
  T *own_x, *own_y, *other;  // other: [kStages][2][kCols][kW]
  float *lses, *deltas;      // of the queries: [kRows] (dQ), [kStages][kCols] (dK, dV)
  float* scratch;            // of this warp
  int* wild;                 // [2]: a tile of the other side has infinities or NaN
  float* windows;            // kT5: [kStages][kWindow] relative biases, see load_window()
  float (&grad)[C::kM][kW / 8][4];

  // What the current query head adds.
  int64_t h, hk, hv;

  __device__ GlobalRows<T> q_rows(int64_t i) const {
    return {row_at<T>(p.q, p.q_at, b, h, qs.first + i), p.q_at.row, static_cast<int>(p.head_dim),
            p.q_vectors};
  }
  __device__ GlobalRows<T> k_rows(int64_t j) const {
    return {row_at<T>(p.k, p.k_at, b, hk, ks.first + j), p.k_at.row, static_cast<int>(p.head_dim),
            p.k_vectors};
  }
  __device__ GlobalRows<T> v_rows(int64_t j) const {
    return {row_at<T>(p.v, p.v_at, b, hv, ks.first + j), p.v_at.row, static_cast<int>(p.value_dim),
            p.v_vectors};
  }
  __device__ GlobalRows<T> dout_rows(int64_t i) const {
    return {row_at<T>(p.dout, p.dout_at, b, h, qs.first + i), p.dout_at.row,
            static_cast<int>(p.value_dim), p.dout_vectors};
  }
  __device__ int64_t lse_at(int64_t i) const {
    return b * p.lse_batch + h * p.lse_head + qs.first + i;
  }
  // The lse of a query; inf, which makes every weight 0, for one that does
  // not exist or sees nothing.
  __device__ float lse_of(int64_t i) const {
    if (i >= qs.count) return bits_to_float(0x7F800000u);
    const float x = p.lse[lse_at(i)];
    return x == bits_to_float(0xFF800000u) ? -x : x;
  }

  // Rows of the other side that a row of this one sees, or is seen by.
  __device__ KeyRange partners(int64_t row) const {
    if constexpr (kOwnsQueries) {
      return tenfold::visible_keys(p.mask, row, qs.count, ks.count);
    } else {
      const int64_t at = row - first_place(p.mask, qs.count, ks.count);
      const int64_t first = at - p.mask.right, last = at + p.mask.left + 1;
      return {first < 0 ? 0 : first, last > qs.count ? qs.count : last < 0 ? 0 : last};
    }
  }

  // lse and delta of `count` queries from `first` on, to place `to`.
  __device__ void load_sums(int64_t first, int to, int count) const {
    for (int i = threadIdx.x; i < count; i += C::kThreads) {
      lses[to + i] = lse_of(first + i);
      deltas[to + i] = first + i < qs.count ? p.delta[lse_at(first + i)] : 0.0f;
    }
  }

  // Of the rows of the block from `row` on, in a tile of the other side.
  __device__ TileRange<C::kCols> partners_in(int64_t first, int row) const {
    const int64_t place = first_place(p.mask, qs.count, ks.count), at = row0 + row - first;
    if constexpr (kOwnsQueries)
      return {at + place - p.mask.left, at + place + p.mask.right + 1, ks.count - first};
    return {at - place - p.mask.right, at - place + p.mask.left + 1, qs.count - first};
  }

  __device__ void load_own() const {
    if constexpr (kOwnsQueries) {
      load_tile<T, kW, C::kRows, C::kThreads>(own_x, q_rows(row0), 0, rows);
      load_tile<T, kW, C::kRows, C::kThreads>(own_y, dout_rows(row0), 0, rows);
      load_sums(row0, 0, C::kRows);
    } else {
      load_tile<T, kW, C::kRows, C::kThreads>(own_x, k_rows(row0), 0, rows);
      if constexpr (kGrad == Grad::k)
        load_tile<T, kW, C::kRows, C::kThreads>(own_y, v_rows(row0), 0, rows);
    }
  }

  __device__ T* other_tile(int64_t tile, int which) const {
    return other + (tile % C::kStages * 2 + which) * (C::kCols * kW);
  }

  __device__ float* window(int64_t tile) const { return windows + tile % C::kStages * C::kWindow; }

  __device__ void load_other(int64_t tile, const KeyRange& range) const {
    const int64_t first = tile * C::kCols;
    const int lo = in_tile(range.first - first, C::kCols);
    const int hi = in_tile(range.last - first, C::kCols);
    if constexpr (kT5) {
      const int64_t corner =
          kOwnsQueries ? first - row0 - (C::kRows - 1) : row0 - first - (C::kCols - 1);
      if (p.relative_lut != nullptr)
        load_window(p, h, corner - p.mask.place, C::kWindow, window(tile));
    }
    if constexpr (kOwnsQueries) {
      load_tile<T, kW, C::kCols, C::kThreads>(other_tile(tile, 0), k_rows(first), lo, hi);
      load_tile<T, kW, C::kCols, C::kThreads>(other_tile(tile, 1), v_rows(first), lo, hi);
    } else {
      load_tile<T, kW, C::kCols, C::kThreads>(other_tile(tile, 0), q_rows(first), lo, hi);
      load_tile<T, kW, C::kCols, C::kThreads>(other_tile(tile, 1), dout_rows(first), lo, hi);
      load_sums(first, static_cast<int>(tile % C::kStages) * C::kCols, C::kCols);
    }
    copy_commit();
  }

  // x: products q . k; y: products dout . v (not for dV). x becomes what multiplies the other rows.
  __device__ void make_weights(int64_t tile, const AttentionBias& bias, float (&x)[C::kM][C::kN][4],
                               const float (&y)[C::kM][C::kN][4]) const {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * C::kM;
    const int64_t first = tile * C::kCols;
    const int stage = static_cast<int>(tile % C::kStages) * C::kCols;
    const float scale = p.softcap > 0.0f ? p.scale / p.softcap : p.scale;
    const TileRange<C::kCols> range = partners_in(first, warp_row + lane / 4);
#pragma unroll
    for (int m = 0; m < C::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = warp_row + 16 * m + lane / 4 + 8 * half;
        const int lo = range.lo(16 * m + 8 * half);
        const int hi = own < rows ? range.hi(16 * m + 8 * half) : 0;
#pragma unroll
        for (int n = 0; n < C::kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int col = 8 * n + lane % 4 * 2 + i;
            float& value = x[m][n][2 * half + i];
            if (col < lo || col >= hi) {
              value = 0.0f;
              continue;
            }
            float logit = value * scale, slope = 1.0f;
            if (!kT5 && p.softcap > 0.0f) {
              const float t = Units::tanh(logit);
              logit = p.softcap * t, slope = 1.0f - t * t;
            }
            if (!kT5 && bias.data != nullptr) {
              const int64_t query = kOwnsQueries ? row0 + own : first + col;
              const int64_t key = kOwnsQueries ? first + col : row0 + own;
              const float add = bias_at(bias, query * bias.row + key * bias.key);
              logit = add == bits_to_float(0xFF800000u) ? add : logit + add;
            }
            if constexpr (kT5) {
              if (p.relative_lut != nullptr)
                logit += window(
                    tile)[kOwnsQueries ? col - own + C::kRows - 1 : own - col + C::kCols - 1];
            }
            const int query_at = kOwnsQueries ? own : stage + col;
            value = Units::exp((logit - lses[query_at]) * Units::kPerNatural);
            if constexpr (kGrad != Grad::v) {
              // A weight of 0 ends it: what is behind a mask may be anything.
              value =
                  value == 0.0f ? 0.0f : value * (y[m][n][2 * half + i] - deltas[query_at]) * slope;
            }
          }
      }
  }

  // Which of the warp's weights of a tile are kept. Drawn while there are no products yet that
  // would need the registers.
  __device__ uint64_t draw(int64_t tile) const {
    return draw_kept<kOwnsQueries, C::kM, C::kN>(
        p.dropout, static_cast<uint32_t>(b * p.q_heads + h), row0 + threadIdx.x / 32 * 16 * C::kM,
        tile * C::kCols);
  }

  // Where this warp's sums of relative position 0 lie.
  __device__ float* warp_sums() const {
    const int64_t tiles = (p.queries.length + C::kRows - 1) / C::kRows;
    const int64_t block = b * tiles + row0 / C::kRows;
    const int64_t warp = (h * p.batch * tiles + block) * C::kWarps + threadIdx.x / 32;
    return p.sums + warp * p.sums_pitch + p.sums_pitch / 2;
  }

  __device__ void clear_distances() const {
    float* const to = warp_sums() - p.sums_pitch / 2;
    for (int i = threadIdx.x % 32; i < p.sums_pitch; i += 32) to[i] = 0.0f;
    __syncwarp();
  }

  // Adds the tile's dS to the warp's sums by distance. A tile beyond the reach of the bias is of
  // one bucket: one sum. Else 8 rows at a time go through the values' memory, which nobody needs
  // any more, and a lane sums a diagonal; no two lanes have the same.
  __device__ void add_distances(int64_t tile, const float (&x)[C::kM][C::kN][4]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* const sums = warp_sums();
    const int64_t corner = tile * C::kCols - row0 - p.mask.place;
    const bool behind = corner + C::kCols - 1 <= -p.reach;
    const bool ahead = corner - (C::kRows - 1) >= p.reach;
    if (behind || ahead) {
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < C::kM; ++m)
#pragma unroll
        for (int n = 0; n < C::kN; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum += x[m][n][i];
      for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      if (lane == 0) sums[behind ? -p.reach : p.reach] += sum;
      __syncwarp();
      return;
    }
    __syncthreads();  // all warps have multiplied with the values
    float* const staged = reinterpret_cast<float*>(other_tile(tile, 1)) + warp * 8 * C::kCols;
    static_assert(C::kWarps * 8 * 4 <= kW * static_cast<int>(sizeof(T)));
#pragma unroll
    for (int m = 0; m < C::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < C::kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            staged[lane / 4 * C::kCols + 8 * n + lane % 4 * 2 + i] = x[m][n][2 * half + i];
        __syncwarp();
        const int64_t first = corner - (warp * 16 * C::kM + 16 * m + 8 * half);
        for (int d = lane - 7; d < C::kCols; d += 32) {
          float sum = 0.0f;
#pragma unroll
          for (int r = 0; r < 8; ++r)
            if (d + r >= 0 && d + r < C::kCols) sum += staged[r * C::kCols + d + r];
          sums[first + d] += sum;
        }
        __syncwarp();
      }
  }

  // All that query head h adds to the block's rows.
  __device__ void add_head(int64_t head) {
    h = head;
    hk = clamped(p.q_to_k[h], p.k_heads - 1), hv = clamped(p.q_to_v[h], p.v_heads - 1);
    if (rows == 0) return;
    const KeyRange range{partners(row0).first, partners(row0 + rows - 1).last};
    if (range.first >= range.last) return;
    const AttentionBias bias = bias_of(p.bias, b, h);
    __syncthreads();  // the last head's tiles are used up
    const int64_t begin = range.first / C::kCols, end = (range.last + C::kCols - 1) / C::kCols;
    load_own();
    load_other(begin, range);
    if (threadIdx.x == 0) wild[begin % 2] = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      copy_wait<0>();
      __syncthreads();
      if (C::kStages == 2 && tile + 1 < end) load_other(tile + 1, range);
      if (threadIdx.x == 0) wild[(tile + 1) % 2] = 0;
      add_tile(tile, bias);
      if (C::kStages == 2) continue;
      __syncthreads();
      if (tile + 1 < end) load_other(tile + 1, range);
    }
  }

  __device__ void add_tile(int64_t tile, const AttentionBias& bias) const {
    const int warp_row = threadIdx.x / 32 * 16 * C::kM;
    const int dims = static_cast<int>(p.head_dim), value_dims = static_cast<int>(p.value_dim);
    [[maybe_unused]] uint64_t keep = 0;
    if constexpr (kT5) {
      if (p.dropout.below != 0) keep = draw(tile);
    }
    float x[C::kM][C::kN][4] = {}, y[C::kM][C::kN][4] = {};
    multiply_transposed<T, kW>(own_x, warp_row, other_tile(tile, 0), 0, round_up(dims, 16), x);
    if constexpr (kGrad != Grad::v)
      multiply_transposed<T, kW>(own_y, warp_row, other_tile(tile, 1), 0, round_up(value_dims, 16),
                                 y);
    if constexpr (kT5 && kGrad != Grad::v) {
      if (p.dropout.below != 0) drop_weights(p.dropout, keep, y);
    }
    make_weights(tile, bias, x, y);
    if constexpr (kT5 && kGrad == Grad::v) {
      if (p.dropout.below != 0) drop_weights(p.dropout, keep, x);
    }
    if constexpr (kT5 && kOwnsQueries) {
      if (p.sums != nullptr) add_distances(tile, x);
    }
    const T* const factors = other_tile(tile, kGrad == Grad::v);
    const int columns = kGrad == Grad::v ? value_dims : dims;
    // What a row does not see must not reach it, whatever it holds.
    const int64_t first = tile * C::kCols;
    if (bias.data != nullptr || partners(row0 + rows - 1).first > first ||
        partners(row0).last < first + C::kCols) {
      find_wild<T, kW, C::kCols, C::kThreads>(factors, columns, wild + tile % 2);
      __syncthreads();
      if (wild[tile % 2]) return accumulate_seen<T, kW>(x, factors, columns, grad);
    }
    accumulate<T, kW>(x, factors, columns, scratch, grad);
  }
};

template <class T, int kW, Grad kGrad, bool kT5>
__global__ void __launch_bounds__(BackwardTile<T, kW>::kThreads, 2)
    dha_attention_backward_kernel(BackwardArgs p) {
  using C = BackwardTile<T, kW>;
  constexpr bool kOwnsQueries = kGrad == Grad::q;
  TENFOLD_SHARED(int, chosen, 1);
  constexpr int kQueries = kOwnsQueries ? C::kRows : C::kStages * C::kCols;
  TENFOLD_SHARED(float, lses, kQueries);
  TENFOLD_SHARED(float, deltas, kQueries);
  TENFOLD_SHARED(int, wild, 2);
  TENFOLD_SHARED(float, windows, kT5 ? C::kStages * C::kWindow : 1);
  TENFOLD_DYNAMIC_SHARED(memory);
  const Work w = find_work(kOwnsQueries ? p.queries : p.keys, p.batch,
                           kOwnsQueries       ? p.q_heads
                           : kGrad == Grad::k ? p.k_heads
                                              : p.v_heads,
                           C::kRows, blockIdx.x, kOwnsQueries);
  if (w.first < 0) return;
  // Behind the last sequence of a packed side there is nothing on the other one.
  const bool real = w.batch < p.batch;
  const Rows qs = kOwnsQueries || real ? sequence_rows(p.queries, p.batch, w.batch) : Rows{0, 0};
  const Rows ks = !kOwnsQueries || real ? key_rows(p, w.batch) : Rows{0, 0};
  const int rows = in_tile((kOwnsQueries ? qs.count : ks.count) - w.first, C::kRows);
  // Keys at and beyond kv_len have gradients too: 0.
  const int written = kT5 && !kOwnsQueries ? in_tile(p.keys.length - w.first, C::kRows) : rows;
  const int warp = threadIdx.x / 32, warp_row = warp * 16 * C::kM;
  T* const tiles = reinterpret_cast<T*>(memory);
  float* const scratch =
      reinterpret_cast<float*>(tiles + (2 * C::kRows + 2 * C::kStages * C::kCols) * kW);
  float grad[C::kM][kW / 8][4] = {};
  BackwardBlock<T, kW, kGrad, kT5> block{p,
                                         w.batch,
                                         w.first,
                                         rows,
                                         qs,
                                         ks,
                                         tiles,
                                         tiles + C::kRows * kW,
                                         tiles + 2 * C::kRows * kW,
                                         lses,
                                         deltas,
                                         scratch + warp * C::kScratch,
                                         wild,
                                         windows,
                                         grad,
                                         0,
                                         0,
                                         0};
  int64_t head = w.head;
  if constexpr (kOwnsQueries) {
    head = ranked_head(p.q_to_k, p.q_heads, w.head, chosen);
    if constexpr (kT5) {
      block.h = head;
      if (p.sums != nullptr) block.clear_distances();
    }
    block.add_head(head);
  } else {
    const IntArray& map = kGrad == Grad::k ? p.q_to_k : p.q_to_v;
    const int64_t most = (kGrad == Grad::k ? p.k_heads : p.v_heads) - 1;
    for (int64_t h = 0; h < p.q_heads; ++h)
      if (clamped(map[h], most) == head) block.add_head(h);
  }
  float factor[C::kM][2];
#pragma unroll
  for (int m = 0; m < C::kM; ++m) factor[m][0] = factor[m][1] = kGrad == Grad::v ? 1.0f : p.scale;
  const RowLayout at = kGrad == Grad::q ? p.dq_at : kGrad == Grad::k ? p.dk_at : p.dv_at;
  T* const to = static_cast<T*>(kGrad == Grad::q   ? p.dq
                                : kGrad == Grad::k ? p.dk
                                                   : p.dv) +
                w.batch * at.batch + head * at.head +
                ((kOwnsQueries ? qs : ks).first + w.first + warp_row) * at.row;
  store_rows<T, kW>(grad, factor, block.own_x, warp_row, to, at.row, written - warp_row,
                    static_cast<int>(kGrad == Grad::v ? p.value_dim : p.head_dim),
                    kGrad == Grad::q   ? p.dq_vectors
                    : kGrad == Grad::k ? p.dk_vectors
                                       : p.dv_vectors);
}

template <class T, int kW, Grad kGrad>
int64_t backward_blocks(const BackwardArgs& p) {
  constexpr int kRows = BackwardTile<T, kW>::kRows;
  if (kGrad == Grad::q) return p.q_heads * tiles_per_head(p.queries, p.batch, kRows);
  return (kGrad == Grad::k ? p.k_heads : p.v_heads) * tiles_per_head(p.keys, p.batch, kRows);
}

template <class T, int kW>
int64_t sums_of_head(const BackwardArgs& p) {
  using C = BackwardTile<T, kW>;
  return tiles_per_head(p.queries, p.batch, C::kRows) * C::kWarps;
}

template <class T, int kW>
int sums_pitch(int reach) {  // tiles that the reach touches stand out on both sides
  return 2 * (reach + BackwardTile<T, kW>::kRows + BackwardTile<T, kW>::kCols) + 1;
}

template <class T, int kW, Grad kGrad, bool kT5>
void launch_dha_backward(const BackwardArgs& p, cudaStream_t stream) {
  using C = BackwardTile<T, kW>;
  if constexpr (kGrad == Grad::q) {
    const int64_t rows = (p.queries.cu.given() ? 1 : p.batch) * p.q_heads * p.queries.length;
    if (rows > 0)
      TENFOLD_LAUNCH(dha_delta_kernel<T>, static_cast<unsigned>((rows + 3) / 4), 128, stream, p);
  }
  const int64_t blocks = backward_blocks<T, kW, kGrad>(p);
  if (blocks == 0) return;
  TENFOLD_LAUNCH_SHARED((dha_attention_backward_kernel<T, kW, kGrad, kT5>),
                        static_cast<unsigned>(blocks), C::kThreads, C::kBytes, C::kBytes, stream,
                        p);
}

}  // namespace tenfold::cuda
