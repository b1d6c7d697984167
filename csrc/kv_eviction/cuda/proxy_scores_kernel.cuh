// SPDX-License-Identifier: Apache-2.0
// Device code of proxy_scores. 128 threads = 4 warps make a tile of 64 proxy rows x 64 keys:
// warp w owns rows 16 w .. 16 w + 15, in the fragment layout of mma.m16n8k16 (thread: 2 rows x
// 8 column pairs). 16-bit types use the tensor cores, float32 the same layout with FMAs.
//   lse pass:     one block per (row tile, key split): running max and sum of its keys;
//   combine:      one thread per row: lse over the splits;
//   column pass:  one block per (batch, key head, 64 keys) walks over all rows: it owns its
//                 columns, so there are no atomics and the order of additions is fixed.
#pragma once

#include "core/convert.cuh"
#include "kv_eviction/proxy_scores.h"

namespace tenfold::cuda {

struct ProxyArgs {
  const void* q;
  const void* k;
  const float* lse;  // [B, Hq, W]: input of the column pass
  bool own_lse;      // found here: an infinite one means that every weight is NaN
  float* partial;    // [splits, rows, 2]: max and sum of the lse pass
  float* lse_out;    // [B, Hq, W]
  float* scores;     // [B, Hkv, L]
  int64_t batch, q_heads, kv_heads, num_proxies, length, head_dim;
  int64_t q_stride[3], k_stride[3];
  bool q_vectors, k_vectors;  // rows are whole, aligned 16-byte vectors
  IntArray positions, kv_start, kv_lens, kmap;
  bool positions_per_row;
  int64_t q_offset;
  float scale;
  bool causal;
  int64_t window;
  ScoreReduce reduce;
  int64_t splits, keys_per_split;
};

constexpr int kTileRows = 64, kTileKeys = 64, kProxyThreads = 128;
constexpr int kProxyBlocks = 4;  // on an SM, at least: what shared memory allows on sm_80
// Head dims staged at once (256 bytes a row), and elements between staged rows: the 16-byte shift
// lets fragment reads hit all banks.
template <class T>
constexpr int kDepth = 256 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPitch = kDepth<T> + 16 / static_cast<int>(sizeof(T));
constexpr int kMmaDepth = 16;
constexpr float kNothing = -1e30f;

struct Visible {
  int64_t lo, hi;  // keys [lo, hi)
};

TENFOLD_HD int64_t key_head(const ProxyArgs& p, int64_t h) {
  return p.kmap.given() ? p.kmap[h] : h / (p.q_heads / p.kv_heads);
}

TENFOLD_HD Visible visible_keys(const ProxyArgs& p, int64_t b, int64_t w) {
  int64_t begin = p.kv_start.given() ? p.kv_start[b] : 0;
  begin = begin < 0 ? 0 : begin > p.length ? p.length : begin;
  int64_t count = p.kv_lens.given() ? p.kv_lens[b] : p.length;
  count = count < 0 ? 0 : count > p.length - begin ? p.length - begin : count;
  const int64_t end = begin + count;
  const int64_t pos = p.positions.given()
                          ? p.positions[p.positions_per_row ? b * p.num_proxies + w : w]
                          : p.q_offset + w;
  if (pos < begin || pos >= end) return {0, 0};
  const int64_t lo = p.window >= 0 && pos - p.window + 1 > begin ? pos - p.window + 1 : begin;
  const int64_t hi = p.causal && pos + 1 < end ? pos + 1 : end;
  return lo < hi ? Visible{lo, hi} : Visible{0, 0};
}

// Head dims [d0, d0 + depth) of the tile's rows; zeros where there is no row or dim.
template <class T>
__device__ inline void stage(const T* const* rows, T* tile, int64_t d0, int64_t d, int depth,
                             bool vectors) {
  static_assert(kTileRows == kTileKeys);
  constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kVectors = kDepth<T> / kPer;
  if (vectors) {
#pragma unroll
    for (int i = threadIdx.x; i < kTileRows * kVectors; i += kProxyThreads) {
      const int r = i / kVectors, c = i % kVectors * kPer;
      if (c >= depth) continue;
      uint4 value{0, 0, 0, 0};
      if (rows[r] != nullptr && d0 + c < d)
        value = *reinterpret_cast<const uint4*>(rows[r] + d0 + c);
      *reinterpret_cast<uint4*>(tile + r * kPitch<T> + c) = value;
    }
    return;
  }
  for (int i = threadIdx.x; i < kTileRows * kDepth<T>; i += kProxyThreads) {
    const int r = i / kDepth<T>, c = i % kDepth<T>;
    if (c >= depth) continue;
    T value{};
    if (rows[r] != nullptr && d0 + c < d) value = rows[r][d0 + c];
    tile[r * kPitch<T> + c] = value;
  }
}

template <class T>
__device__ inline uint32_t pair_at(const T* tile, int row, int col) {
  return *reinterpret_cast<const uint32_t*>(tile + row * kPitch<T> + col);
}

// acc += q tile (16 rows of this warp) x k tile^T over the staged depth, a multiple of kMmaDepth.
template <class T>
__device__ inline void multiply(const T* q, const T* k, int depth, float (&acc)[8][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp * 16 + lane / 4, col = lane % 4 * 2;
  if constexpr (sizeof(T) == 2) {
    for (int step = 0; step < depth; step += kMmaDepth) {
      const uint32_t a[4] = {pair_at(q, row, step + col), pair_at(q, row + 8, step + col),
                             pair_at(q, row, step + col + 8), pair_at(q, row + 8, step + col + 8)};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int key = n * 8 + lane / 4;
        const uint32_t b[2] = {pair_at(k, key, step + col), pair_at(k, key, step + col + 8)};
        mma_m16n8k16<T>(acc[n], a, b);
      }
    }
  } else {
    for (int i = 0; i < depth; ++i) {
      const float top = q[row * kPitch<T> + i], bottom = q[(row + 8) * kPitch<T> + i];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const T* key = k + (n * 8 + col) * kPitch<T> + i;
        const float left = key[0], right = key[kPitch<T>];
        acc[n][0] += top * left;
        acc[n][1] += top * right;
        acc[n][2] += bottom * left;
        acc[n][3] += bottom * right;
      }
    }
  }
}

// The tiles of a block. One that holds whole rows stays valid as long as its rows do, so it is
// staged only if it is fresh: the q tile of the lse pass and the k tile of the column pass stay.
template <class T>
struct Tiles {
  const T** q_rows;
  const T** k_rows;
  T* q;
  T* k;
  int64_t* lo;  // keys that each row sees
  int64_t* hi;
};

// A key position relative to the tile, cut to it.
TENFOLD_HD int in_tile(int64_t j) {
  return j < 0 ? 0 : j > kTileKeys ? kTileKeys : static_cast<int>(j);
}

// Logits of the block's 64 rows and keys [j0, j0 + 64), hidden ones -inf. In natural units: the
// column pass subtracts an lse, whose rounding in other units would show at large logits.
template <class T>
__device__ inline void tile_logits(const ProxyArgs& p, const Tiles<T>& t, const T* k_head,
                                   int64_t j0, bool fresh_q, bool fresh_k, float (&acc)[8][4]) {
  const bool whole = p.head_dim <= kDepth<T>;
#pragma unroll
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
  for (int j = threadIdx.x; j < kTileKeys; j += kProxyThreads)
    t.k_rows[j] = j0 + j < p.length ? k_head + (j0 + j) * p.k_stride[2] : nullptr;
  __syncthreads();
  for (int64_t d0 = 0; d0 < p.head_dim; d0 += kDepth<T>) {
    const int64_t left = (p.head_dim - d0 + kMmaDepth - 1) / kMmaDepth * kMmaDepth;
    const int depth = left < kDepth<T> ? static_cast<int>(left) : kDepth<T>;
    if (fresh_q || !whole) stage(t.q_rows, t.q, d0, p.head_dim, depth, p.q_vectors);
    if (fresh_k || !whole) stage(t.k_rows, t.k, d0, p.head_dim, depth, p.k_vectors);
    __syncthreads();
    multiply(t.q, t.k, depth, acc);
    __syncthreads();
  }
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, col = lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int lo = in_tile(t.lo[row + half * 8] - j0), hi = in_tile(t.hi[row + half * 8] - j0);
#pragma unroll
    for (int n = 0; n < 8; ++n)
      for (int i = 0; i < 2; ++i) {
        const int key = n * 8 + col + i;
        float& x = acc[n][2 * half + i];
        x = key >= lo && key < hi ? x * p.scale : bits_to_float(0xFF800000u);
      }
  }
}

// Describes rows [row0, row0 + 64) of the rows of one (batch, query head).
template <class T>
__device__ inline void describe_head_rows(const ProxyArgs& p, int64_t b, int64_t h, int64_t row0,
                                          const Tiles<T>& t) {
  const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[1];
  for (int r = threadIdx.x; r < kTileRows; r += kProxyThreads) {
    const int64_t w = row0 + r;
    const Visible see = w < p.num_proxies ? visible_keys(p, b, w) : Visible{0, 0};
    t.q_rows[r] = see.lo < see.hi ? q + w * p.q_stride[2] : nullptr;
    t.lo[r] = see.lo;
    t.hi[r] = see.hi;
  }
  __syncthreads();
}

// Keys that any row of the tile sees; every warp finds it for itself.
__device__ inline Visible tile_range(const int64_t* lo, const int64_t* hi) {
  const int lane = threadIdx.x % 32;
  Visible any{INT64_MAX, 0};
  for (int r = lane; r < kTileRows; r += 32) {
    if (lo[r] >= hi[r]) continue;
    any.lo = lo[r] < any.lo ? lo[r] : any.lo;
    any.hi = hi[r] > any.hi ? hi[r] : any.hi;
  }
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other_lo = __shfl_xor_sync(0xFFFFFFFFu, any.lo, step);
    const int64_t other_hi = __shfl_xor_sync(0xFFFFFFFFu, any.hi, step);
    any.lo = other_lo < any.lo ? other_lo : any.lo;
    any.hi = other_hi > any.hi ? other_hi : any.hi;
  }
  return any.lo < any.hi ? any : Visible{0, 0};
}

// Reduces over the 4 lanes that share a row.
template <class F>
__device__ inline float over_row(float x, F f) {
  x = f(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return f(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

TENFOLD_HD float larger(float a, float b) {
  return a > b || a != a ? a : b;
}

template <class T>
__global__ void __launch_bounds__(kProxyThreads, sizeof(T) == 2 ? kProxyBlocks + 1 : kProxyBlocks)
    proxy_lse_kernel(ProxyArgs p) {
  TENFOLD_SHARED(const T*, q_rows, kTileRows);
  TENFOLD_SHARED(const T*, k_rows, kTileKeys);
  TENFOLD_SHARED(int64_t, lo, kTileRows);
  TENFOLD_SHARED(int64_t, hi, kTileRows);
  TENFOLD_SHARED(T, q_tile, kTileRows * kPitch<T>);
  TENFOLD_SHARED(T, k_tile, kTileKeys * kPitch<T>);
  const Tiles<T> tiles{q_rows, k_rows, q_tile, k_tile, lo, hi};
  const int64_t row_tiles = (p.num_proxies + kTileRows - 1) / kTileRows;
  int64_t at = blockIdx.x;
  const int64_t split = at % p.splits;
  at /= p.splits;
  const int64_t row0 = at % row_tiles * kTileRows;
  at /= row_tiles;
  const int64_t h = at % p.q_heads, b = at / p.q_heads;
  describe_head_rows(p, b, h, row0, tiles);
  const Visible any = tile_range(lo, hi);
  const int64_t first = split * p.keys_per_split;
  int64_t last = first + p.keys_per_split < any.hi ? first + p.keys_per_split : any.hi;
  const int64_t hk = key_head(p, h);
  const bool known = hk >= 0 && hk < p.kv_heads;  // else the row sees nothing and scores nothing
  if (!known) last = first;
  const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + (known ? hk : 0) * p.k_stride[1];
  float top[2] = {kNothing, kNothing}, sum[2] = {0.0f, 0.0f};
  const int64_t start = any.lo > first ? any.lo / kTileKeys * kTileKeys : first;
  for (int64_t j0 = start; j0 < last; j0 += kTileKeys) {
    float acc[8][4];
    tile_logits(p, tiles, k, j0, j0 == start, true, acc);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = top[half];
      for (int n = 0; n < 8; ++n) now = larger(larger(now, acc[n][2 * half]), acc[n][2 * half + 1]);
      now = over_row(now, larger);
      float more = 0.0f;
      for (int n = 0; n < 8; ++n)
        more += expf(acc[n][2 * half] - now) + expf(acc[n][2 * half + 1] - now);
      more = over_row(more, [](float x, float y) { return x + y; });
      sum[half] = sum[half] * expf(top[half] - now) + more;
      top[half] = now;
    }
  }
  const int lane = threadIdx.x % 32;
  if (lane % 4 != 0) return;
  for (int half = 0; half < 2; ++half) {
    const int64_t w = row0 + threadIdx.x / 32 * 16 + lane / 4 + half * 8;
    if (w >= p.num_proxies) continue;
    const int64_t rows = p.batch * p.q_heads * p.num_proxies;
    float* out = p.partial + 2 * (split * rows + (b * p.q_heads + h) * p.num_proxies + w);
    out[0] = top[half];
    out[1] = sum[half];
  }
}

constexpr int kCombineThreads = 128;

__global__ void __launch_bounds__(kCombineThreads) proxy_lse_combine_kernel(ProxyArgs p) {
  const int64_t rows = p.batch * p.q_heads * p.num_proxies;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= rows) return;
  float top = kNothing, sum = 0.0f;
  for (int64_t s = 0; s < p.splits; ++s) top = larger(top, p.partial[2 * (s * rows + row)]);
  for (int64_t s = 0; s < p.splits; ++s) {
    const float* part = p.partial + 2 * (s * rows + row);
    sum += part[1] * expf(part[0] - top);
  }
  const bool sees = sum != 0.0f;                      // NaN sums see something
  if (top == bits_to_float(0x7F800000u)) sum = 1.0f;  // of NaN: the lse is inf
  p.lse_out[row] = sees ? top + logf(sum) : bits_to_float(0xFF800000u);
}

// Sum of this thread's columns over the block's rows; every thread gets columns[key] in shared
// memory.
__device__ inline void reduce_columns(float (&sums)[8][2], float* by_warp, float* columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 2; ++i) {
      float x = sums[n][i];
      for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
      if (lane < 4) by_warp[warp * kTileKeys + n * 8 + lane * 2 + i] = x;
      sums[n][i] = 0.0f;
    }
  __syncthreads();
  for (int j = threadIdx.x; j < kTileKeys; j += kProxyThreads) {
    float x = 0.0f;
    for (int w = 0; w < kProxyThreads / 32; ++w) x += by_warp[w * kTileKeys + j];
    columns[j] = x;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kProxyThreads, kProxyBlocks) proxy_columns_kernel(ProxyArgs p) {
  TENFOLD_SHARED(const T*, q_rows, kTileRows);
  TENFOLD_SHARED(const T*, k_rows, kTileKeys);
  TENFOLD_SHARED(int64_t, lo, kTileRows);
  TENFOLD_SHARED(int64_t, hi, kTileRows);
  TENFOLD_SHARED(T, q_tile, kTileRows * kPitch<T>);
  TENFOLD_SHARED(T, k_tile, kTileKeys * kPitch<T>);
  const Tiles<T> tiles{q_rows, k_rows, q_tile, k_tile, lo, hi};
  TENFOLD_SHARED(float, by_warp, kProxyThreads / 32 * kTileKeys);
  TENFOLD_SHARED(float, columns, kTileKeys);
  const int64_t key_tiles = (p.length + kTileKeys - 1) / kTileKeys;
  const int64_t j0 = blockIdx.x % key_tiles * kTileKeys, pair = blockIdx.x / key_tiles;
  const int64_t hk = pair % p.kv_heads, b = pair / p.kv_heads;
  const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + hk * p.k_stride[1];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  float sums[8][2] = {}, result = 0.0f;
  int64_t heads = 0;
  bool have_k = false;
  for (int64_t h = 0; h < p.q_heads; ++h) {
    if (key_head(p, h) != hk) continue;
    for (int64_t row0 = 0; row0 < p.num_proxies; row0 += kTileRows) {
      describe_head_rows(p, b, h, row0, tiles);
      const Visible any = tile_range(lo, hi);
      if (any.lo < j0 + kTileKeys && any.hi > j0) {
        float acc[8][4];
        tile_logits(p, tiles, k, j0, true, !have_k, acc);
        have_k = true;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = row + half * 8;
          if (lo[r] >= hi[r]) continue;
          float lse = p.lse[(b * p.q_heads + h) * p.num_proxies + row0 + r];
          if (lse == bits_to_float(0xFF800000u)) continue;  // every logit is -inf: contributes 0
          if (p.own_lse && lse == bits_to_float(0x7F800000u)) lse = bits_to_float(0x7FC00000u);
          const int from = in_tile(lo[r] - j0), to = in_tile(hi[r] - j0);
#pragma unroll
          for (int n = 0; n < 8; ++n)
            for (int i = 0; i < 2; ++i) {
              const int key = n * 8 + lane % 4 * 2 + i;  // a hidden one adds 0 even if lse is NaN
              if (key >= from && key < to) sums[n][i] += expf(acc[n][2 * half + i] - lse);
            }
        }
      }
      __syncthreads();
    }
    if (p.reduce == ScoreReduce::max) {
      reduce_columns(sums, by_warp, columns);
      if (threadIdx.x < kTileKeys)
        result = heads == 0 ? columns[threadIdx.x] : larger(columns[threadIdx.x], result);
      __syncthreads();
    }
    ++heads;
  }
  if (p.reduce != ScoreReduce::max) {
    reduce_columns(sums, by_warp, columns);
    if (threadIdx.x < kTileKeys) result = columns[threadIdx.x];
    if (p.reduce == ScoreReduce::mean && heads > 0) result /= static_cast<float>(heads);
  }
  if (threadIdx.x < kTileKeys && j0 + threadIdx.x < p.length)
    p.scores[(b * p.kv_heads + hk) * p.length + j0 + threadIdx.x] = result;
}

// Whether rows can be read as 16-byte vectors; call it when pointers and strides are known.
inline void choose_vectors(ProxyArgs& p, int64_t element_size) {
  const auto vectors = [&](const void* data, const int64_t (&stride)[3]) {
    int64_t bits = p.head_dim;
    for (int i = 0; i < 3; ++i) bits |= stride[i];
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(bits * element_size)) % 16 ==
           0;
  };
  p.q_vectors = vectors(p.q, p.q_stride);
  p.k_vectors = vectors(p.k, p.k_stride);
}

// Key splits of the lse pass: enough blocks to fill a large GPU (132 SMs, 4 blocks each), at least
// 8 key tiles a block so that the combine stays small.
inline void choose_splits(ProxyArgs& p) {
  const int64_t blocks = p.batch * p.q_heads * ((p.num_proxies + kTileRows - 1) / kTileRows);
  const int64_t tiles = (p.length + kTileKeys - 1) / kTileKeys;
  int64_t splits = blocks > 0 ? (528 + blocks - 1) / blocks : 1;
  const int64_t most = tiles / 8 > 1 ? tiles / 8 : 1;
  splits = splits < most ? splits : most;
  p.keys_per_split = (tiles + splits - 1) / splits * kTileKeys;
  p.splits = p.keys_per_split > 0 ? (p.length + p.keys_per_split - 1) / p.keys_per_split : 1;
  p.splits = p.splits > 0 ? p.splits : 1;
}

template <class T>
void launch_proxy_scores(const ProxyArgs& p, bool has_lse, cudaStream_t stream) {
  const int64_t rows = p.batch * p.q_heads * p.num_proxies;
  const int64_t row_tiles = (p.num_proxies + kTileRows - 1) / kTileRows;
  if (!has_lse && rows > 0) {
    TENFOLD_LAUNCH(proxy_lse_kernel<T>,
                   static_cast<unsigned>(p.batch * p.q_heads * row_tiles * p.splits), kProxyThreads,
                   stream, p);
    TENFOLD_LAUNCH(proxy_lse_combine_kernel,
                   static_cast<unsigned>((rows + kCombineThreads - 1) / kCombineThreads),
                   kCombineThreads, stream, p);
  }
  ProxyArgs args = p;
  args.own_lse = !has_lse;
  const int64_t blocks = p.batch * p.kv_heads * ((p.length + kTileKeys - 1) / kTileKeys);
  if (blocks > 0)
    TENFOLD_LAUNCH(proxy_columns_kernel<T>, static_cast<unsigned>(blocks), kProxyThreads, stream,
                   args);
}

}  // namespace tenfold::cuda
