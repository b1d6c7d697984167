// SPDX-License-Identifier: Apache-2.0
// Device code of head_cka. A block multiplies kCkaTile rows of head a with as many of head b <= a,
// keeps the products in registers over the whole width, and leaves the sum of their squares; a
// second kernel adds the tiles of every pair of heads in order and normalises. 16-bit values are
// multiplied by mma.sync, float32 and centred ones as float32.
#pragma once

#include "core/convert.cuh"

namespace tenfold::cuda {

struct CkaArgs {
  const void* w;
  int64_t head_stride, row_stride;  // elements
  int64_t heads, dims, length;
  int64_t cuts;     // tiles along a head
  float* mean;      // [H, d], or null
  double* partial;  // [H (H + 1) / 2, cuts, cuts]
  float* cka;       // [H, H]
};

constexpr int kCkaTile = 64, kCkaThreads = 256, kCkaDepth = 32;
constexpr int kCkaPitch = kCkaTile + 4;      // floats: 16-byte rows, few bank conflicts
constexpr int kCkaMmaPitch = kCkaDepth + 8;  // 16-bit values

struct CkaTile {
  int64_t a, b, a_row, b_row;  // heads and first rows
};

__device__ inline int64_t cka_pair(int64_t a, int64_t b) {  // b <= a
  return a * (a + 1) / 2 + b;
}

__device__ inline CkaTile cka_tile(const CkaArgs& p) {
  const auto cuts = static_cast<uint32_t>(p.cuts);  // no more than there are blocks
  const uint32_t b_cut = blockIdx.x % cuts, rest = blockIdx.x / cuts, a_cut = rest % cuts;
  const int64_t pair = rest / cuts;
  auto a = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(pair) + 1.0) - 1.0) / 2.0);
  while (a * (a + 1) / 2 > pair) --a;
  while ((a + 1) * (a + 2) / 2 <= pair) ++a;
  return {a, pair - a * (a + 1) / 2, int64_t{a_cut} * kCkaTile, int64_t{b_cut} * kCkaTile};
}

template <class T>
__global__ void __launch_bounds__(kCkaThreads) cka_mean_kernel(CkaArgs p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kCkaThreads / 32) + threadIdx.x / 32;
  const bool inside = row < p.heads * p.dims;
  const int64_t from = inside ? row / p.dims * p.head_stride + row % p.dims * p.row_stride : 0;
  float sum = 0.0f;
  for (int64_t x = threadIdx.x % 32; x < p.length && inside; x += 32)
    sum += to_float(static_cast<const T*>(p.w)[from + x]);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (inside && threadIdx.x % 32 == 0) p.mean[row] = sum / static_cast<float>(p.length);
}

// Value (row, x) of a head, less its mean; 0 outside.
template <class T>
__device__ inline float cka_value(const CkaArgs& p, int64_t head, int64_t row, int64_t x) {
  if (row >= p.dims || x >= p.length) return 0.0f;
  const T* w = static_cast<const T*>(p.w);
  const float value = to_float(w[head * p.head_stride + row * p.row_stride + x]);
  return p.mean != nullptr ? value - p.mean[head * p.dims + row] : value;
}

// Sum over the block, in double, of one value per thread.
__device__ inline void store_block_sum(float value, double* to) {
  TENFOLD_SHARED(float, warp_sums, kCkaThreads / 32);
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (int warp = 0; warp < kCkaThreads / 32; ++warp) total += warp_sums[warp];
  *to = total;
}

// float32: a thread owns 4 x 4 products.
template <class T>
__global__ void __launch_bounds__(kCkaThreads) cka_fma_kernel(CkaArgs p) {
  TENFOLD_SHARED(float, left, kCkaDepth* kCkaPitch);
  TENFOLD_SHARED(float, right, kCkaDepth* kCkaPitch);
  const CkaTile t = cka_tile(p);
  const int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
  float sum[4][4] = {};
  for (int64_t x0 = 0; x0 < p.length; x0 += kCkaDepth) {
    for (int e = threadIdx.x; e < kCkaTile * kCkaDepth; e += kCkaThreads) {
      const int row = e / kCkaDepth, x = e % kCkaDepth;
      left[x * kCkaPitch + row] = cka_value<T>(p, t.a, t.a_row + row, x0 + x);
      right[x * kCkaPitch + row] = cka_value<T>(p, t.b, t.b_row + row, x0 + x);
    }
    __syncthreads();
#pragma unroll 8
    for (int x = 0; x < kCkaDepth; ++x) {
      const uint4 a_bits = *reinterpret_cast<const uint4*>(left + x * kCkaPitch + ty);
      const uint4 b_bits = *reinterpret_cast<const uint4*>(right + x * kCkaPitch + tx);
      float a[4], b[4];
      memcpy(a, &a_bits, sizeof(a));
      memcpy(b, &b_bits, sizeof(b));
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += a[r] * b[c];
    }
    __syncthreads();
  }
  float squares = 0.0f;
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) squares += sum[r][c] * sum[r][c];
  store_block_sum(squares, p.partial + blockIdx.x);
}

// 16-bit: 8 warps, each 16 rows of a and 32 of b, which are the columns of the product.
template <class T>
__global__ void __launch_bounds__(kCkaThreads) cka_mma_kernel(CkaArgs p) {
  TENFOLD_SHARED(T, left, kCkaTile * kCkaMmaPitch);
  TENFOLD_SHARED(T, right, kCkaTile * kCkaMmaPitch);
  const CkaTile t = cka_tile(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = warp / 2 * 16, col0 = warp % 2 * 32;
  const auto pair_at = [&](const T* tile, int row, int x) {
    uint32_t bits;
    memcpy(&bits, tile + row * kCkaMmaPitch + x, sizeof(bits));
    return bits;
  };
  float sum[4][4] = {};
  for (int64_t x0 = 0; x0 < p.length; x0 += kCkaDepth) {
    for (int e = threadIdx.x; e < kCkaTile * kCkaDepth; e += kCkaThreads) {
      const int row = e / kCkaDepth, x = e % kCkaDepth;
      from_float(cka_value<T>(p, t.a, t.a_row + row, x0 + x), left + row * kCkaMmaPitch + x);
      from_float(cka_value<T>(p, t.b, t.b_row + row, x0 + x), right + row * kCkaMmaPitch + x);
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < kCkaDepth; x += 16) {
      const int at = x + lane % 4 * 2, row = row0 + lane / 4;
      const uint32_t a[4] = {pair_at(left, row, at), pair_at(left, row + 8, at),
                             pair_at(left, row, at + 8), pair_at(left, row + 8, at + 8)};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = col0 + c * 8 + lane / 4;
        const uint32_t b[2] = {pair_at(right, column, at), pair_at(right, column, at + 8)};
        mma_m16n8k16<T>(sum[c], a, b);
      }
    }
    __syncthreads();
  }
  float squares = 0.0f;
  for (int c = 0; c < 4; ++c)
    for (int e = 0; e < 4; ++e) squares += sum[c][e] * sum[c][e];
  store_block_sum(squares, p.partial + blockIdx.x);
}

__device__ inline double cka_squares(const CkaArgs& p, int64_t a, int64_t b) {
  const int64_t tiles = p.cuts * p.cuts;
  const double* from = p.partial + cka_pair(a, b) * tiles;
  double sum = 0.0;
  for (int64_t i = 0; i < tiles; ++i) sum += from[i];
  return sum;
}

__global__ void __launch_bounds__(kCkaThreads) cka_finish_kernel(CkaArgs p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kCkaThreads + threadIdx.x;
  if (at >= p.heads * p.heads) return;
  const int64_t i = at / p.heads, j = at % p.heads;
  const double both = i >= j ? cka_squares(p, i, j) : cka_squares(p, j, i);
  p.cka[at] = static_cast<float>(both / sqrt(cka_squares(p, i, i) * cka_squares(p, j, j)));
}

inline int64_t cka_cuts(int64_t dims) {
  return (dims + kCkaTile - 1) / kCkaTile;
}

inline int64_t cka_tiles(int64_t heads, int64_t dims) {
  return heads * (heads + 1) / 2 * cka_cuts(dims) * cka_cuts(dims);
}

template <class T>
void launch_head_cka(const CkaArgs& p, cudaStream_t stream) {
  if (p.heads == 0) return;
  const auto blocks = [](int64_t items, int64_t of) {
    return static_cast<unsigned>((items + of - 1) / of);
  };
  const int64_t tiles = cka_tiles(p.heads, p.dims);
  if (p.mean != nullptr && p.dims > 0)
    TENFOLD_LAUNCH(cka_mean_kernel<T>, blocks(p.heads * p.dims, kCkaThreads / 32), kCkaThreads,
                   stream, p);
  if (tiles > 0) {
    if constexpr (sizeof(T) == 2) {
      if (p.mean == nullptr) {
        TENFOLD_LAUNCH(cka_mma_kernel<T>, static_cast<unsigned>(tiles), kCkaThreads, stream, p);
      } else {
        TENFOLD_LAUNCH(cka_fma_kernel<T>, static_cast<unsigned>(tiles), kCkaThreads, stream, p);
      }
    } else {
      TENFOLD_LAUNCH(cka_fma_kernel<T>, static_cast<unsigned>(tiles), kCkaThreads, stream, p);
    }
  }
  TENFOLD_LAUNCH(cka_finish_kernel, blocks(p.heads * p.heads, kCkaThreads), kCkaThreads, stream, p);
}

}  // namespace tenfold::cuda
