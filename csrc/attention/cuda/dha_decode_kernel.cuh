// SPDX-License-Identifier: Apache-2.0
// Device code of dha_decode: one block per (sequence, block of query heads, split of the keys); all
// query heads of the block share what it loads, whatever the two maps say. Per chunk of 128 keys:
//   keys:    each key head's tiles pass by once; logits of its query heads to shared memory;
//   softmax: a warp per row: running maximum and sum, weights in place of the logits;
//   values:  each value head's tiles pass by once; weighted sums of its query heads in registers,
//            added to the running ones in shared memory.
// Tiles come through a ring of asynchronous copies that does not stop between these steps. A second
// kernel combines the splits in order.
#pragma once

#include "attention/cuda/dha_decode_heads.cuh"

namespace tenfold::cuda {

// Sizes such that a block fits the 99 KB of shared memory that every device from sm_80 on has.
template <class T, int kWidth>
struct DecodeTile {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kW = kWidth;
  static constexpr int kKeys = (kHalf ? 2 : 1) * (kW == 256 ? 16 : 32);  // of a tile
  static constexpr int kStages = kHalf ? 3 : 2;
  static constexpr int kRowTiles = kW == 64 ? 4 : kW == 128 ? 2 : 1;
  static constexpr int kMaxRows = 16 * kRowTiles;
  static constexpr int kN = kHalf ? 2 : 1;            // key columns of a warp: 8 kN
  static constexpr int kKeyWarps = kKeys / (8 * kN);  // the other warps take other rows
  static constexpr int kCols = kW / kDhaWarps;        // value columns of a warp
  static constexpr int kTiles = kDhaChunk / kKeys;    // of a head in a chunk
  static constexpr int kPitch = kDhaChunk + 4;        // of a row of logits
  static constexpr int kSumPitch = kW + 4;            // of a row of sums
  static_assert(kDhaWarps % kKeyWarps == 0 && kCols % 16 == 0);

  static constexpr int bytes(int64_t rows) {
    const int r = static_cast<int>(rows);
    return ((r + 16) * kW + kStages * kKeys * kW) * static_cast<int>(sizeof(T)) +
           r * (kPitch + kSumPitch) * static_cast<int>(sizeof(float));
  }
};

template <class T, int kW>
struct DecodeBlock {
  using C = DecodeTile<T, kW>;
  using Shape = Tile<T, kW>;
  using Units = SoftmaxUnits<T>;
  const DhaDecodeOnDevice& p;
  BlockHeads heads;
  int64_t b;
  SequenceTokens tokens;
  int64_t first, last;  // tokens of this split
  TokenPlace* places;   // [2][kDhaChunk]
  T *q_tile, *ring;
  float *logits, *sums;               // [rows][kPitch]; [rows][kSumPitch]
  float *row_top, *row_sum, *shrink;  // [rows]

  // A tile in the block's sequence of tiles. Their number can pass 2^31, that of the chunks not.
  struct Place {
    int chunk, rest, stage;  // rest: tile of the chunk; stage: its place in the ring
  };
  __device__ int tiles_of_chunk() const {
    return (heads.keys.count + heads.values.count) * C::kTiles;
  }
  __device__ int num_chunks() const {
    return static_cast<int>((last - first + kDhaChunk - 1) / kDhaChunk);
  }
  __device__ void advance(Place& at) const {
    at.stage = at.stage + 1 == C::kStages ? 0 : at.stage + 1;
    if (++at.rest == tiles_of_chunk()) at.rest = 0, ++at.chunk;
  }
  __device__ void find_chunk(int chunk) const {
    find_tokens(p, b, tokens.base, first + static_cast<int64_t>(chunk) * kDhaChunk, last,
                places + chunk % 2 * kDhaChunk);
  }

  // The queries of the block's rows; zeros behind them.
  __device__ void load_queries() const {
    const int dims = static_cast<int>(p.head_dim), width = round_up(dims, 16);
    const int queries = static_cast<int>(p.num_queries);
    for (int i = threadIdx.x; i < (heads.rows + 16) * width; i += kDhaThreads) {
      const int r = i / width, d = i % width;
      T value{};
      if (r < heads.rows && d < dims)
        value = static_cast<const T*>(
            p.q_data)[b * p.q_batch + heads.query_head[r / queries] * p.q_head +
                      r % queries * p.q_query + d * p.q_dim];
      q_tile[Shape::at(r, d)] = value;
    }
    for (int i = threadIdx.x; i < heads.rows * C::kSumPitch; i += kDhaThreads) sums[i] = 0.0f;
    for (int i = threadIdx.x; i < heads.rows; i += kDhaThreads)
      row_top[i] = bits_to_float(0xFF800000u), row_sum[i] = 0.0f;
  }

  // Starts the copy of the tile `next` and moves on; behind the last tile an empty group.
  __device__ void load(Place& next) const {
    if (next.chunk < num_chunks()) {
      const int chunk = next.chunk, rest = next.rest;
      const int group = rest / C::kTiles, row0 = rest % C::kTiles * C::kKeys;
      const bool is_key = group < heads.keys.count;
      const int head =
          is_key ? heads.keys.head[group] : heads.values.head[group - heads.keys.count];
      const CacheStrides at = is_key ? p.k : p.v;
      const int dims = static_cast<int>(is_key ? p.head_dim : p.value_dim);
      const T* data = static_cast<const T*>(is_key ? p.k_data : p.v_data) + head * at.head;
      const TokenPlace* const place = places + chunk % 2 * kDhaChunk + row0;
      const int64_t left = last - first - static_cast<int64_t>(chunk) * kDhaChunk - row0;
      const int rows = left < 0 ? 0 : left < C::kKeys ? static_cast<int>(left) : C::kKeys;
      T* const tile = ring + next.stage * (C::kKeys * kW);
      if (is_key ? p.k_vectors : p.v_vectors) {
        copy_rows(tile, data, at, place, rows, dims);
      } else {
        for (int i = threadIdx.x; i < C::kKeys * kW; i += kDhaThreads) {
          const int r = i / kW, d = i % kW;
          T value{};
          if (r < rows && d < dims)
            value = data[place[r].batch * at.batch + place[r].token * at.token + d];
          tile[Shape::at(r, d)] = value;
        }
      }
    }
    copy_commit();
    advance(next);
  }

  __device__ static void copy_rows(T* tile, const T* data, const CacheStrides& at,
                                   const TokenPlace* place, int rows, int dims) {
    const int width = round_up(dims, 16);
#pragma unroll 4
    for (int i = threadIdx.x; i < C::kKeys * Shape::kVectors; i += kDhaThreads) {
      const int r = i / Shape::kVectors, d = i % Shape::kVectors * Shape::kPer;
      if (d >= width) continue;
      const bool valid = r < rows && d < dims;
      const T* from = data;
      if (valid) from += place[r].batch * at.batch + place[r].token * at.token + d;
      copy16_async(tile + Shape::at(r, d), from, valid);
    }
  }

  // Logits of the rows of a key head and a tile of keys; -inf where a row does not see.
  __device__ void key_tile(const T* tile, int group, int64_t key0, int column0) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int begin = heads.keys.begin[group], end = heads.keys.begin[group + 1];
    const int key_row = warp % C::kKeyWarps * 8 * C::kN;
    const float scale = p.softcap > 0.0f ? p.scale / p.softcap : p.scale * Units::kPerNatural;
    for (int row0 = begin + warp / C::kKeyWarps * 16; row0 < end;
         row0 += kDhaWarps / C::kKeyWarps * 16) {
      float acc[1][C::kN][4] = {};
      multiply_transposed<T, kW>(q_tile, row0, tile, key_row,
                                 round_up(static_cast<int>(p.head_dim), 16), acc);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + lane / 4 + 8 * half;
        if (row >= end) continue;
        const int64_t at = tokens.length - p.num_queries + row % static_cast<int>(p.num_queries);
        const int64_t from = p.window_left < 0 ? 0 : at - p.window_left;
#pragma unroll
        for (int n = 0; n < C::kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int key = key_row + 8 * n + lane % 4 * 2 + i;
            float x = acc[0][n][2 * half + i] * scale;
            if (p.softcap > 0.0f) x = p.softcap * Units::kPerNatural * Units::tanh(x);
            const int64_t j = key0 + key;
            const bool sees = j <= at && j >= from && j < last;
            logits[row * C::kPitch + column0 + key] = sees ? x : bits_to_float(0xFF800000u);
          }
      }
    }
  }

  // Logits of the chunk to weights, in the same memory: as T from the row's begin.
  __device__ void softmax() const {
    constexpr int kEach = kDhaChunk / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int row = warp; row < heads.rows; row += kDhaWarps) {
      float* const x = logits + row * C::kPitch;
      float value[kEach], top = row_top[row], sum = 0.0f;
      const float old = top;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        value[e] = x[lane + 32 * e];
        top = fmaxf(top, value[e]);
      }
      for (int step = 1; step < 32; step *= 2)
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
      const float base = top == bits_to_float(0xFF800000u) ? 0.0f : top;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        value[e] = Units::exp(value[e] - base);
        sum += value[e];
      }
      for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      __syncwarp();  // everybody has read its logits
#pragma unroll
      for (int e = 0; e < kEach; ++e) from_float(value[e], reinterpret_cast<T*>(x) + lane + 32 * e);
      if (lane == 0) {
        const float factor = Units::exp(old - base);
        shrink[row] = factor;
        row_top[row] = top;
        row_sum[row] = row_sum[row] * factor + sum;
      }
    }
  }

  using Sums = float[C::kRowTiles][C::kCols / 8][4];

  // Whether each row sees every token of the tile that is there.
  __device__ bool seen_by_all(int64_t key0) const {
    const int64_t end = key0 + C::kKeys < last ? key0 + C::kKeys : last;
    return end - 1 <= tokens.length - p.num_queries &&
           (p.window_left < 0 || key0 >= tokens.length - 1 - p.window_left);
  }

  // Weights of the r-th row of a value head, from a column on; rows behind the last give anything.
  __device__ const T* weights(int r, int column0) const {
    return reinterpret_cast<const T*>(logits + heads.value_row[r] * C::kPitch) + column0;
  }

  __device__ void tensor_core_values(const T* tile, int begin, int end, int column0,
                                     Sums& acc) const {
    const int lane = threadIdx.x % 32, col0 = threadIdx.x / 32 * C::kCols;
#pragma unroll
    for (int k = 0; k < C::kKeys; k += 16) {
      uint32_t y[C::kCols / 16][4];
#pragma unroll
      for (int n = 0; n < C::kCols / 16; ++n)
        load_matrices_transposed(y[n],
                                 tile + Shape::at(k + lane % 16, col0 + 16 * n + lane / 16 * 8));
#pragma unroll
      for (int t = 0; t < C::kRowTiles; ++t) {
        if (begin + 16 * t >= end) break;
        uint32_t x[4];
        load_matrices(x, weights(begin + 16 * t + lane % 16, column0 + k + lane / 16 * 8));
#pragma unroll
        for (int n = 0; n < C::kCols / 16; ++n) {
          const uint32_t left[2] = {y[n][0], y[n][1]}, right[2] = {y[n][2], y[n][3]};
          mma_m16n8k16<T>(acc[t][2 * n], x, left);
          mma_m16n8k16<T>(acc[t][2 * n + 1], x, right);
        }
      }
    }
  }

  // acc += weights x values for the rows of a value head, the warp's columns. What a row does not
  // see must not reach it, whatever it holds: such tiles leave out weights of 0.
  __device__ void value_tile(const T* tile, int group, int column0, bool whole, Sums& acc) const {
    const int lane = threadIdx.x % 32, col0 = threadIdx.x / 32 * C::kCols;
    const int begin = heads.values.begin[group], end = heads.values.begin[group + 1];
    if (col0 >= p.value_dim) return;
    bool done = false;
    if constexpr (C::kHalf) {
      if (whole) tensor_core_values(tile, begin, end, column0, acc);
      done = whole;
    }
    if (done) return;
#pragma unroll
    for (int t = 0; t < C::kRowTiles; ++t) {
      if (begin + 16 * t >= end) break;
      const T* const top = weights(begin + 16 * t + lane / 4, column0);
      const T* const bottom = weights(begin + 16 * t + lane / 4 + 8, column0);
#pragma unroll 2
      for (int k = 0; k < C::kKeys; ++k) {
        const float a = to_float(top[k]), c = to_float(bottom[k]);
        const bool skip_a = !whole && a == 0.0f, skip_c = !whole && c == 0.0f;
#pragma unroll
        for (int n = 0; n < C::kCols / 8; ++n) {
          const T* y = tile + Shape::at(k, col0 + 8 * n + lane % 4 * 2);
          const float left = to_float(y[0]), right = to_float(y[1]);
          if (!skip_a) acc[t][n][0] += a * left, acc[t][n][1] += a * right;
          if (!skip_c) acc[t][n][2] += c * left, acc[t][n][3] += c * right;
        }
      }
    }
  }

  // The chunk's sums of a value head join the running ones; every number has one owner.
  __device__ void add_sums(int group, Sums& acc) const {
    const int lane = threadIdx.x % 32, col0 = threadIdx.x / 32 * C::kCols;
    const int begin = heads.values.begin[group], end = heads.values.begin[group + 1];
#pragma unroll
    for (int t = 0; t < C::kRowTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = begin + 16 * t + lane / 4 + i / 2 * 8;
        if (r >= end) continue;
        const int row = heads.value_row[r];
        const float factor = shrink[row];
#pragma unroll
        for (int n = 0; n < C::kCols / 8; ++n) {
          float& x = sums[row * C::kSumPitch + col0 + 8 * n + lane % 4 * 2 + i % 2];
          x = x * factor + acc[t][n][i];
        }
      }
#pragma unroll
    for (int t = 0; t < C::kRowTiles; ++t)
      for (int n = 0; n < C::kCols / 8; ++n)
        for (int i = 0; i < 4; ++i) acc[t][n][i] = 0.0f;
  }

  __device__ void run() const {
    const int chunks = num_chunks();
    Place now{}, next{};
    find_chunk(0);
    load_queries();
    __syncthreads();
    for (int n = 0; n < C::kStages - 1; ++n) load(next);
    Sums acc = {};
    for (; now.chunk < chunks; advance(now)) {
      const int chunk = now.chunk, rest = now.rest;
      const int group = rest / C::kTiles, column0 = rest % C::kTiles * C::kKeys;
      copy_wait<C::kStages - 2>();
      __syncthreads();  // this tile is there; everybody is done with the last one
      if (rest == 0) find_chunk(chunk + 1);
      load(next);
      const T* const tile = ring + now.stage * (C::kKeys * kW);
      const int64_t key0 = first + static_cast<int64_t>(chunk) * kDhaChunk + column0;
      if (group < heads.keys.count) {
        key_tile(tile, group, key0, column0);
        if (rest + 1 == heads.keys.count * C::kTiles) {
          __syncthreads();
          softmax();  // the weights are read after the next tile's barrier
        }
      } else {
        value_tile(tile, group - heads.keys.count, column0, seen_by_all(key0), acc);
        if (rest % C::kTiles == C::kTiles - 1) add_sums(group - heads.keys.count, acc);
      }
    }
    copy_wait<0>();
    __syncthreads();
  }

  // Results, or this split's part of them.
  __device__ void store(int64_t split) const {
    const int queries = static_cast<int>(p.num_queries), dims = static_cast<int>(p.value_dim);
    for (int i = threadIdx.x; i < heads.rows * dims; i += kDhaThreads) {
      const int row = i / dims, d = i % dims;
      const int64_t to =
          (b * p.q_heads + heads.query_head[row / queries]) * queries + row % queries;
      const float sum = row_sum[row], x = sums[row * C::kSumPitch + d];
      if (p.partial != nullptr) {
        float* const part = p.partial + (to * p.splits + split) * (2 + dims);
        part[2 + d] = x;
        if (d == 0) part[0] = row_top[row], part[1] = sum;
        continue;
      }
      const bool sees = sum != 0.0f;  // NaN sums see something
      from_float(sees ? x / sum : 0.0f, static_cast<T*>(p.out) + to * dims + d);
      if (d == 0)
        p.lse[to] = sees ? row_top[row] * Units::kNatural + logf(sum) : bits_to_float(0xFF800000u);
    }
  }
};

template <class T, int kW>
__global__ void __launch_bounds__(kDhaThreads, 2) dha_decode_kernel(DhaDecodeOnDevice p) {
  using C = DecodeTile<T, kW>;
  TENFOLD_SHARED(int, storage, kHeadStorage);
  TENFOLD_SHARED(TokenPlace, places, 2 * kDhaChunk);
  TENFOLD_SHARED(float, row_numbers, 3 * kMaxBlockRows);
  TENFOLD_DYNAMIC_SHARED(memory);
  const int64_t head_blocks = (p.q_heads + p.block_heads - 1) / p.block_heads;
  const int64_t split = blockIdx.x % p.splits, rest = blockIdx.x / p.splits;
  const int64_t b = rest / head_blocks;
  SequenceTokens tokens = sequence_tokens(p, b);
  if (p.k_heads == 0 || p.v_heads == 0 || (p.layout == CacheLayout::paged && p.num_blocks == 0))
    tokens.length = 0;
  // Tokens that anybody sees, cut into splits of whole chunks.
  int64_t begin = p.window_left < 0 ? 0 : tokens.length - p.num_queries - p.window_left;
  begin = begin < 0 ? 0 : begin;
  const int64_t chunks = (tokens.length - begin + kDhaChunk - 1) / kDhaChunk;
  const int64_t each = (chunks + p.splits - 1) / p.splits * kDhaChunk;
  const int64_t first = begin + split * each, end = first + each;
  const int64_t last = end < tokens.length ? end : tokens.length;
  const BlockHeads heads = describe_heads(p, rest % head_blocks, storage);
  T* const q_tile = reinterpret_cast<T*>(memory);
  T* const ring = q_tile + (heads.rows + 16) * kW;
  float* const logits = reinterpret_cast<float*>(ring + C::kStages * C::kKeys * kW);
  const DecodeBlock<T, kW> block{p,
                                 heads,
                                 b,
                                 tokens,
                                 first,
                                 last > first ? last : first,
                                 places,
                                 q_tile,
                                 ring,
                                 logits,
                                 logits + heads.rows * C::kPitch,
                                 row_numbers,
                                 row_numbers + kMaxBlockRows,
                                 row_numbers + 2 * kMaxBlockRows};
  block.run();
  block.store(split);
}

// One warp per row; the parts are added in the order of the splits.
template <class T>
__global__ void __launch_bounds__(kDhaThreads) dha_combine_kernel(DhaDecodeOnDevice p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDhaWarps + threadIdx.x / 32;
  if (row >= p.batch * p.q_heads * p.num_queries) return;
  const int64_t step = 2 + p.value_dim;
  const float* const parts = p.partial + row * p.splits * step;
  float top = bits_to_float(0xFF800000u), sum = 0.0f;
  for (int64_t i = 0; i < p.splits; ++i) top = fmaxf(top, parts[i * step]);
  const float base = top == bits_to_float(0xFF800000u) ? 0.0f : top;
  for (int64_t i = 0; i < p.splits; ++i)
    sum += parts[i * step + 1] * SoftmaxUnits<T>::exp(parts[i * step] - base);
  const bool sees = sum != 0.0f;  // NaN sums see something
  for (int64_t d = threadIdx.x % 32; d < p.value_dim; d += 32) {
    float x = 0.0f;
    for (int64_t i = 0; i < p.splits; ++i)
      x += parts[i * step + 2 + d] * SoftmaxUnits<T>::exp(parts[i * step] - base);
    from_float(sees ? x / sum : 0.0f, static_cast<T*>(p.out) + row * p.value_dim + d);
  }
  if (threadIdx.x % 32 == 0)
    p.lse[row] = sees ? top * SoftmaxUnits<T>::kNatural + logf(sum) : bits_to_float(0xFF800000u);
}

// As many query heads a block as fit: every key and value is then read once where they all do.
// Splits: enough blocks to fill a large GPU (132 SMs, 2 blocks each), at least 2 chunks a split.
template <class T, int kW>
int64_t plan_dha_decode(DhaDecodeOnDevice& p) {
  const int64_t queries = p.num_queries > 0 ? p.num_queries : 1;
  const int64_t most = DecodeTile<T, kW>::kMaxRows / queries;
  p.block_heads = p.q_heads < most ? p.q_heads : most;
  p.block_heads = p.block_heads > 0 ? p.block_heads : 1;
  const int64_t blocks = p.batch * ((p.q_heads + p.block_heads - 1) / p.block_heads);
  const int64_t chunks = (p.length + kDhaChunk - 1) / kDhaChunk;
  int64_t splits = p.num_splits;
  if (splits == 0) {
    splits = blocks > 0 ? (264 + blocks - 1) / blocks : 1;
    splits = splits < (chunks + 1) / 2 ? splits : (chunks + 1) / 2;
  }
  splits = splits < chunks ? splits : chunks;
  p.splits = splits > 0 ? splits : 1;
  const int64_t rows = p.batch * p.q_heads * p.num_queries;
  return p.splits > 1 ? rows * p.splits * (2 + p.value_dim) : 0;
}

template <class T, int kW>
int64_t decode_blocks(const DhaDecodeOnDevice& p) {
  if (p.num_queries == 0) return 0;
  return p.batch * ((p.q_heads + p.block_heads - 1) / p.block_heads) * p.splits;
}

template <class T, int kW>
void launch_dha_decode(const DhaDecodeOnDevice& p, cudaStream_t stream) {
  const int64_t blocks = decode_blocks<T, kW>(p);
  if (blocks == 0) return;
  using C = DecodeTile<T, kW>;
  const int bytes = C::bytes(p.block_heads * p.num_queries);
  TENFOLD_LAUNCH_SHARED((dha_decode_kernel<T, kW>), static_cast<unsigned>(blocks), kDhaThreads,
                        bytes, C::bytes(C::kMaxRows), stream, p);
  if (p.partial == nullptr) return;
  const int64_t rows = p.batch * p.q_heads * p.num_queries;
  TENFOLD_LAUNCH(dha_combine_kernel<T>, static_cast<unsigned>((rows + kDhaWarps - 1) / kDhaWarps),
                 kDhaThreads, stream, p);
}

}  // namespace tenfold::cuda
