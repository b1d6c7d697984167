// SPDX-License-Identifier: Apache-2.0
// Tiles of rows in shared memory and the two products of attention on them, for one warp at a time.
// A warp owns 16 kM rows in the fragment layout of mma.m16n8k16: acc[m][n][2 half + i] is row
// 16 m + lane / 4 + 8 half, column 8 n + lane % 4 * 2 + i. 16-bit types use the tensor cores
// through ldmatrix, float32 the same layout with FMAs (exact products, no TF32).
#pragma once

#include "core/convert.cuh"

namespace tenfold::cuda {

// kW elements a row. The 16-byte vectors of a row are permuted by its number: the 8 rows of an
// ldmatrix (and the 8 row groups of a warp) then read all banks.
template <class T, int kW>
struct Tile {
  static constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kVectors = kW / kPer;
  static_assert(kVectors % 8 == 0);
  __device__ static int at(int row, int col) {
    return row * kW + ((col / kPer) ^ (row & 7)) * kPer + col % kPer;
  }
};

// Rows of global memory; vectors: whole, aligned 16-byte vectors.
template <class T>
struct GlobalRows {
  const T* first;
  int64_t stride;
  int dims;
  bool vectors;
};

TENFOLD_HD int round_up(int x, int step) {
  return (x + step - 1) / step * step;
}

// Rows [lo, hi) of `from` become the tile's rows of the same number; other rows and the columns
// from dims to the next multiple of 16 become zeros. Asynchronous: commit and wait are the
// caller's.
template <class T, int kW, int kRows, int kThreads>
__device__ inline void load_tile(T* tile, const GlobalRows<T>& from, int lo, int hi) {
  using Shape = Tile<T, kW>;
  const int width = round_up(from.dims, 16);
  if (from.vectors) {  // a thread keeps its column
    constexpr int kStep = kThreads / Shape::kVectors;
    static_assert(kThreads % Shape::kVectors == 0);
    const int c = threadIdx.x % Shape::kVectors * Shape::kPer;
    if (c >= width) return;
    const bool there = c < from.dims;
    int r = threadIdx.x / Shape::kVectors;
    int64_t at = r * from.stride + c;
#pragma unroll 1  // nothing waits for a copy, and addresses ahead would take registers
    for (; r < kRows; r += kStep, at += kStep * from.stride) {
      const bool valid = there && r >= lo && r < hi;
      copy16_async(tile + Shape::at(r, c), valid ? from.first + at : from.first, valid);
    }
    return;
  }
  for (int i = threadIdx.x; i < kRows * kW; i += kThreads) {
    const int r = i / kW, c = i % kW;
    if (c >= width) continue;
    T value{};
    if (r >= lo && r < hi && c < from.dims) value = from.first[r * from.stride + c];
    tile[Shape::at(r, c)] = value;
  }
}

__device__ inline void load4(const float* from, float (&to)[4]) {
  const uint4 x = *reinterpret_cast<const uint4*>(from);
  memcpy(to, &x, sizeof(x));
}

// acc += a rows [a_row, a_row + 16 kM) x (b rows [b_row, b_row + 8 kN))^T over `depth` columns, a
// multiple of 16.
template <class T, int kW, int kM, int kN>
__device__ inline void multiply_transposed(const T* a, int a_row, const T* b, int b_row, int depth,
                                           float (&acc)[kM][kN][4]) {
  using Shape = Tile<T, kW>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(kN % 2 == 0);
    a_row += lane % 16, b_row += lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < kW; step += 16) {
      if (step >= depth) break;
      uint32_t x[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
        load_matrices(x[m], a + Shape::at(a_row + 16 * m, step + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t y[4];
        load_matrices(y, b + Shape::at(b_row + 8 * n, step + lane / 8 % 2 * 8));
        const uint32_t left[2] = {y[0], y[1]}, right[2] = {y[2], y[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_m16n8k16<T>(acc[m][n], x[m], left);
          mma_m16n8k16<T>(acc[m][n + 1], x[m], right);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int step = 0; step < depth; step += 16) {  // sums of 16 products: shorter chains
      float part[2 * kM][2 * kN] = {};
#pragma unroll
      for (int d = step; d < step + 16; d += 4) {
        float x[2 * kM][4];
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) load4(a + Shape::at(a_row + 8 * r + lane / 4, d), x[r]);
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n) {
          float y[4];
          load4(b + Shape::at(b_row + n / 2 * 8 + lane % 4 * 2 + n % 2, d), y);
#pragma unroll
          for (int r = 0; r < 2 * kM; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) part[r][n] = fmaf(x[r][e], y[e], part[r][n]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r)
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n) acc[r / 2][n / 2][r % 2 * 2 + n % 2] += part[r][n];
    }
  }
}

// Floats of scratch that accumulate() needs for a warp: its weights, in rows that do not share
// banks.
template <class T, int kM, int kN>
constexpr int kWeightScratch = sizeof(T) == 2 ? 0 : 16 * kM * (8 * kN + 4);

// acc += weights x b rows [0, 8 kN), for the first `dims` columns. The weights are in the layout of
// an accumulator; 16-bit types round them.
template <class T, int kW, int kM, int kN>
__device__ inline void accumulate(const float (&weights)[kM][kN][4], const T* b, int dims,
                                  float* scratch, float (&acc)[kM][kW / 8][4]) {
  using Shape = Tile<T, kW>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kN; k += 2) {
      uint32_t x[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[m][i] =
              pack2<T>(weights[m][k + i / 2][i % 2 * 2], weights[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kW / 8; n += 2) {
        if (8 * n >= dims) break;
        uint32_t y[4];
        load_matrices_transposed(y, b + Shape::at(8 * k + lane % 16, (n + lane / 16) * 8));
        const uint32_t left[2] = {y[0], y[1]}, right[2] = {y[2], y[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_m16n8k16<T>(acc[m][n], x[m], left);
          mma_m16n8k16<T>(acc[m][n + 1], x[m], right);
        }
      }
    }
  } else {
    constexpr int kPitch = 8 * kN + 4;
    const int row = lane / 4, col = lane % 4 * 2;
    __syncwarp();  // the last product has read its weights
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scratch[(16 * m + row + i / 2 * 8) * kPitch + 8 * n + col + i % 2] = weights[m][n][i];
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < 8 * kN; ++k) {
      float x[2 * kM];
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) x[r] = scratch[(8 * r + row) * kPitch + k];
#pragma unroll
      for (int n = 0; n < kW / 8; ++n) {
        if (8 * n >= dims) break;
        const float* y = b + Shape::at(k, 8 * n + col);
        const float left = y[0], right = y[1];
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) {
          float* const sums = acc[r / 2][n] + r % 2 * 2;
          sums[0] = fmaf(x[r], left, sums[0]);
          sums[1] = fmaf(x[r], right, sums[1]);
        }
      }
    }
  }
}

// As accumulate(), but what has weight 0 does not take part: 0 * NaN must not reach a row that does
// not see it. Key by key, for the few tiles that hold such values; the weights are not rounded.
template <class T, int kW, int kM, int kN>
__device__ inline void accumulate_seen(const float (&weights)[kM][kN][4], const T* b, int dims,
                                       float (&acc)[kM][kW / 8][4]) {
  const int lane = threadIdx.x % 32, col = lane % 4 * 2;
#pragma unroll 1
  for (int k = 0; k < 8 * kN; ++k) {
    const int from = k % 8 / 2;  // the lane of the row's four that has the weights
    // Chosen by masks: the weights are registers, and what looks like an index would move them to
    // local memory.
    uint32_t bits[2 * kM] = {};
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t here = 0u - static_cast<uint32_t>(k == 8 * n + k % 8 && i == k % 2);
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r)
          bits[r] |= here & float_to_bits(weights[r / 2][n][r % 2 * 2 + i]);
      }
    float x[2 * kM];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r)
      x[r] = bits_to_float(__shfl_sync(0xFFFFFFFFu, bits[r], lane / 4 * 4 + from));
#pragma unroll
    for (int n = 0; n < kW / 8; ++n) {
      if (8 * n >= dims) break;
      const T* y = b + Tile<T, kW>::at(k, 8 * n + col);
      const float left = to_float(y[0]), right = to_float(y[1]);
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) {
        if (x[r] == 0.0f) continue;
        float* const sums = acc[r / 2][n] + r % 2 * 2;
        sums[0] = fmaf(x[r], left, sums[0]);
        sums[1] = fmaf(x[r], right, sums[1]);
      }
    }
  }
}

// Whether 16 bytes hold an infinity or a NaN.
template <class T>
__device__ inline bool any_wild(const uint4& x) {
  constexpr uint32_t kExponent = sizeof(T) == 4              ? 0x7F800000u
                                 : std::is_same_v<T, bf16_t> ? 0x7F80u
                                                             : 0x7C00u;
  bool wild = false;
  for (const uint32_t word : {x.x, x.y, x.z, x.w}) {
    wild |= (word & kExponent) == kExponent;
    if constexpr (sizeof(T) == 2) wild |= (word >> 16 & kExponent) == kExponent;
  }
  return wild;
}

// Sets *wild if the first `dims` columns of a tile hold an infinity or a NaN. The block's threads
// together; the flag is complete after a barrier.
template <class T, int kW, int kRows, int kThreads>
__device__ inline void find_wild(const T* tile, int dims, int* wild) {
  using Shape = Tile<T, kW>;
  bool found = false;
  for (int i = threadIdx.x; i < kRows * Shape::kVectors; i += kThreads) {
    const int r = i / Shape::kVectors, c = i % Shape::kVectors * Shape::kPer;
    if (c < dims) found |= any_wild<T>(*reinterpret_cast<const uint4*>(tile + Shape::at(r, c)));
  }
  if (found) *wild = 1;
}

// acc * factor of each row, rounded to T, to rows of global memory: the first `rows` of the warp's,
// by way of its own rows of a tile that no other warp touches.
template <class T, int kW, int kM>
__device__ inline void store_rows(const float (&acc)[kM][kW / 8][4], const float (&factor)[kM][2],
                                  T* tile, int tile_row, T* to, int64_t stride, int rows, int dims,
                                  bool vectors) {
  using Shape = Tile<T, kW>;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kW / 8; ++n) {
        if (8 * n >= dims) break;
        const float low = acc[m][n][2 * half] * factor[m][half];
        const float high = acc[m][n][2 * half + 1] * factor[m][half];
        T* at = tile + Shape::at(tile_row + 16 * m + lane / 4 + 8 * half, 8 * n + lane % 4 * 2);
        if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(at) = pack2<T>(low, high);
        } else {
          at[0] = low, at[1] = high;
        }
      }
  __syncwarp();
  if (vectors) {
    for (int i = lane; i < 16 * kM * Shape::kVectors; i += 32) {
      const int r = i / Shape::kVectors, c = i % Shape::kVectors * Shape::kPer;
      if (r < rows && c < dims)
        *reinterpret_cast<uint4*>(to + r * stride + c) =
            *reinterpret_cast<const uint4*>(tile + Shape::at(tile_row + r, c));
    }
    return;
  }
  for (int i = lane; i < 16 * kM * kW; i += 32) {
    const int r = i / kW, c = i % kW;
    if (r < rows && c < dims) to[r * stride + c] = tile[Shape::at(tile_row + r, c)];
  }
}

// Units of the logits of a softmax. 16-bit types count in powers of two, with the one-instruction
// exponential and a tanh of the same precision; float32 in natural units, with the exact functions.
template <class T>
struct SoftmaxUnits {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr float kPerNatural = kHalf ? 1.4426950408889634f : 1.0f;
  static constexpr float kNatural = kHalf ? 0.6931471805599453f : 1.0f;  // of one unit
  __device__ static float exp(float x) {
    if constexpr (kHalf) return fast_exp2(x);
    return expf(x);
  }
  __device__ static float tanh(float x) {  // of natural units; about 2^-23 of 1
    if constexpr (kHalf) return 1.0f - 2.0f / (1.0f + fast_exp2(2.0f * kPerNatural * x));
    return tanhf(x);
  }
};

// Calls f<kW>() for the width of the tiles; float32 has no tile of 64.
template <class T, class F>
void dispatch_width(int64_t head_dim, int64_t value_dim, F&& f) {
  const int64_t dim = head_dim > value_dim ? head_dim : value_dim;
  if constexpr (sizeof(T) == 2) {
    if (dim <= 64) return f.template operator()<64>();
  }
  return dim <= 128 ? f.template operator()<128>() : f.template operator()<256>();
}

}  // namespace tenfold::cuda
