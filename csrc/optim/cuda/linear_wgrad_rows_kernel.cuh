// SPDX-License-Identifier: Apache-2.0
// Device code of linear_wgrad_rows: a block owns a tile of the output and walks the tokens. The
// chosen columns of grad_out and the tile's columns of input lie in shared memory as they do in
// global memory, a token a row; ldmatrix transposes both on the way to mma.sync. 16-bit types only;
// float32 is multiplied by FMAs, exactly.
// Runs of 8 neighbouring chosen columns (ranges of fused weights) are copied asynchronously, others
// element by element.
#pragma once

#include "core/mma_tile.cuh"

namespace tenfold::cuda {

struct WgradArgs {
  const void* grad_out;  // [T, out]
  const void* input;     // [T, in]
  int64_t grad_stride, input_stride;
  int64_t tokens, num_out, num_rows, num_cols;
  IntArray rows;
  void* out;          // [R, in]
  bool grad_vectors;  // aligned: columns of grad_out that are a multiple of 16 bytes
  bool input_vectors, out_pairs;
};

constexpr int kWgradTile = 128, kWgradThreads = 256, kWgradSteps = 32, kWgradStages = 4;

template <class T>
constexpr int kWgradStageBytes = 2 * kWgradSteps * kWgradTile * static_cast<int>(sizeof(T));

// First row and column of this block's tile: row tiles are neighbours, they share input.
struct WgradPlace {
  int64_t row, col;
};

__device__ inline WgradPlace wgrad_place(const WgradArgs& a) {
  const int64_t tiles = (a.num_rows + kWgradTile - 1) / kWgradTile;
  return {blockIdx.x % tiles * kWgradTile, blockIdx.x / tiles * kWgradTile};
}

// Columns of grad_out of the tile's rows, -1 for those outside.
__device__ inline void load_row_numbers(const WgradArgs& a, int64_t row, int64_t* columns) {
  for (int i = threadIdx.x; i < kWgradTile; i += kWgradThreads) {
    const int64_t column = row + i < a.num_rows ? a.rows[row + i] : -1;
    columns[i] = column >= 0 && column < a.num_out ? column : -1;
  }
}

// Tokens [t, t + kWgradSteps) of the chosen columns; missing ones are zeros.
template <class T>
__device__ inline void load_chosen(const WgradArgs& a, const int64_t* columns, int64_t t, T* tile) {
  using Shape = Tile<T, kWgradTile>;
  constexpr int kPer = Shape::kPer;
  for (int i = threadIdx.x; i < kWgradSteps * Shape::kVectors; i += kWgradThreads) {
    const int step = i / Shape::kVectors, c = i % Shape::kVectors * kPer;
    const int64_t first = columns[c];
    const bool valid = t + step < a.tokens;
    const T* from = static_cast<const T*>(a.grad_out) + (valid ? t + step : 0) * a.grad_stride;
    T* const to = tile + Shape::at(step, c);
    bool run = a.grad_vectors && first >= 0 && first % kPer == 0;
#pragma unroll
    for (int k = 1; k < kPer; ++k) run &= columns[c + k] == first + k;
    if (run) {
      copy16_async(to, from + first, valid);
      continue;
    }
    T values[kPer];
#pragma unroll
    for (int k = 0; k < kPer; ++k)
      values[k] = valid && columns[c + k] >= 0 ? from[columns[c + k]] : T{};
    memcpy(to, values, sizeof(values));
  }
}

template <class T>
__device__ inline void load_step(const WgradArgs& a, const int64_t* columns, WgradPlace at,
                                 int64_t t, T* left, T* right) {
  load_chosen(a, columns, t, left);
  const int64_t width = a.num_cols - at.col, height = a.tokens - t;
  const GlobalRows<T> from{
      static_cast<const T*>(a.input) + t * a.input_stride + at.col, a.input_stride,
      static_cast<int>(width < kWgradTile ? width : kWgradTile), a.input_vectors};
  load_tile<T, kWgradTile, kWgradSteps, kWgradThreads>(
      right, from, 0, static_cast<int>(height < kWgradSteps ? height : kWgradSteps));
}

template <class T>
__device__ inline void store_sum(const WgradArgs& a, int64_t row, int64_t col, float low,
                                 float high) {
  if (row >= a.num_rows || col >= a.num_cols) return;
  T* const to = static_cast<T*>(a.out) + row * a.num_cols + col;
  if constexpr (sizeof(T) == 2) {
    if (a.out_pairs) {
      *reinterpret_cast<uint32_t*>(to) = pack2<T>(low, high);
      return;
    }
  }
  from_float(low, to);
  if (col + 1 < a.num_cols) from_float(high, to + 1);
}

// 8 warps in 2 rows of 4; each owns 64 rows and 32 columns of the tile.
template <class T>
__global__ void __launch_bounds__(kWgradThreads, 2) wgrad_mma_kernel(WgradArgs a) {
  using Shape = Tile<T, kWgradTile>;
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int64_t, columns, kWgradTile);
  constexpr int kM = 4, kN = 4, kTile = kWgradSteps * kWgradTile;
  T* const tiles = reinterpret_cast<T*>(memory);
  const WgradPlace at = wgrad_place(a);
  load_row_numbers(a, at.row, columns);
  __syncthreads();
  const int64_t steps = (a.tokens + kWgradSteps - 1) / kWgradSteps;
  const auto load = [&](int64_t step) {
    T* const stage = tiles + step % kWgradStages * 2 * kTile;
    if (step < steps) load_step<T>(a, columns, at, step * kWgradSteps, stage, stage + kTile);
    copy_commit();
  };
  for (int step = 0; step < kWgradStages - 1; ++step) load(step);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = warp / 4 * 16 * kM, col0 = warp % 4 * 8 * kN;
  float acc[kM][kN][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    copy_wait<kWgradStages - 2>();
    __syncthreads();  // this stage is there; the one before it has been read
    load(step + kWgradStages - 1);
    const T* const left = tiles + step % kWgradStages * 2 * kTile;
    const T* const right = left + kTile;
#pragma unroll
    for (int k = 0; k < kWgradSteps; k += 16) {
      uint32_t x[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
        load_matrices_transposed(
            x[m], left + Shape::at(k + lane / 16 * 8 + lane % 8, row0 + 16 * m + lane / 8 % 2 * 8));
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t y[4];
        load_matrices_transposed(y, right + Shape::at(k + lane % 16, col0 + 8 * n + lane / 16 * 8));
        const uint32_t first[2] = {y[0], y[1]}, second[2] = {y[2], y[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_m16n8k16<T>(acc[m][n], x[m], first);
          mma_m16n8k16<T>(acc[m][n + 1], x[m], second);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_sum<T>(a, at.row + row0 + 16 * m + lane / 4 + 8 * half,
                     at.col + col0 + 8 * n + lane % 4 * 2, acc[m][n][2 * half],
                     acc[m][n][2 * half + 1]);
}

// A thread owns rows 4 y + {0..3} and 64 more, columns alike.
__global__ void __launch_bounds__(kWgradThreads, 2) wgrad_fma_kernel(WgradArgs a) {
  using Shape = Tile<float, kWgradTile>;
  TENFOLD_SHARED(float, left, kWgradSteps* kWgradTile);
  TENFOLD_SHARED(float, right, kWgradSteps* kWgradTile);
  TENFOLD_SHARED(int64_t, columns, kWgradTile);
  const WgradPlace at = wgrad_place(a);
  load_row_numbers(a, at.row, columns);
  __syncthreads();
  const int y0 = threadIdx.x / 16 * 4, x0 = threadIdx.x % 16 * 4;
  float sum[8][8] = {};
  for (int64_t t = 0; t < a.tokens; t += kWgradSteps) {
    load_step<float>(a, columns, at, t, left, right);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kWgradSteps; ++k) {
      float y[8], x[8];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint4 y_bits = *reinterpret_cast<const uint4*>(left + Shape::at(k, y0 + 64 * part));
        const uint4 x_bits = *reinterpret_cast<const uint4*>(right + Shape::at(k, x0 + 64 * part));
        memcpy(y + 4 * part, &y_bits, sizeof(y_bits));
        memcpy(x + 4 * part, &x_bits, sizeof(x_bits));
      }
#pragma unroll
      for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[r][c] = fmaf(y[r], x[c], sum[r][c]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 8; ++r)
#pragma unroll
    for (int c = 0; c < 8; c += 2)
      store_sum<float>(a, at.row + r / 4 * 64 + y0 + r % 4, at.col + c / 4 * 64 + x0 + c % 4,
                       sum[r][c], sum[r][c + 1]);
}

inline int64_t wgrad_tiles(const WgradArgs& a) {
  const auto cuts = [](int64_t n) { return (n + kWgradTile - 1) / kWgradTile; };
  return cuts(a.num_rows) * cuts(a.num_cols);
}

template <class T>
void launch_linear_wgrad_rows(const WgradArgs& a, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(wgrad_tiles(a));
  if (tiles == 0) return;
  if constexpr (sizeof(T) == 2) {
    constexpr int kBytes = kWgradStages * kWgradStageBytes<T>;
    TENFOLD_LAUNCH_SHARED(wgrad_mma_kernel<T>, tiles, kWgradThreads, kBytes, kBytes, stream, a);
  } else {
    TENFOLD_LAUNCH(wgrad_fma_kernel, tiles, kWgradThreads, stream, a);
  }
}

}  // namespace tenfold::cuda
