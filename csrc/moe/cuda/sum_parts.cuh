// SPDX-License-Identifier: Apache-2.0
// Sums of parts that blocks have left in float32, in a fixed order: of each column, 8 sums over
// every eighth part, then those. Also the small kernels that finish a loss.
#pragma once

#include "core/vectors.cuh"

namespace tenfold::cuda {

constexpr int kPartThreads = 256, kPartSlices = 8, kPartUnit = 4;
constexpr int kPartColumns = kPartThreads / kPartSlices * kPartUnit;

struct PartArgs {
  const float* parts;  // [layers, count, n]
  int64_t layers, count, n;
  int64_t blocks;  // of a layer
  void* out;       // [layers, n]
};

inline PartArgs part_args(const float* parts, int64_t layers, int64_t count, int64_t n, void* out) {
  return {parts, layers, count, n, (n + kPartColumns - 1) / kPartColumns, out};
}

template <class T>
__global__ void __launch_bounds__(kPartThreads) sum_parts_kernel(PartArgs a) {
  TENFOLD_SHARED(double, sums, kPartSlices* kPartColumns);
  const int64_t layer = blockIdx.x / a.blocks;
  const int unit = static_cast<int>(threadIdx.x) % (kPartColumns / kPartUnit) * kPartUnit;
  const int slice = static_cast<int>(threadIdx.x) / (kPartColumns / kPartUnit);
  const int64_t column = blockIdx.x % a.blocks * kPartColumns, left = a.n - column - unit;
  const float* const from = a.parts + layer * a.count * a.n + column + unit;
  const bool wide = a.n % kPartUnit == 0;
  double sum[kPartUnit] = {};
  if (left > 0) {
#pragma unroll 4
    for (int64_t i = slice; i < a.count; i += kPartSlices) {
      float x[kPartUnit];
      load_some(from + i * a.n, left, wide, x);
#pragma unroll
      for (int q = 0; q < kPartUnit; ++q) sum[q] += x[q];
    }
  }
#pragma unroll
  for (int q = 0; q < kPartUnit; ++q) sums[slice * kPartColumns + unit + q] = sum[q];
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x);
  if (c >= kPartColumns || column + c >= a.n) return;
  double total = 0.0;
#pragma unroll
  for (int s = 0; s < kPartSlices; ++s) total += sums[s * kPartColumns + c];
  from_float(static_cast<float>(total), static_cast<T*>(a.out) + layer * a.n + column + c);
}

template <class T>
void launch_sum_parts(const PartArgs& a, cudaStream_t stream) {
  const int64_t blocks = a.layers * a.blocks;
  if (blocks > 0)
    TENFOLD_LAUNCH(sum_parts_kernel<T>, static_cast<unsigned>(blocks), kPartThreads, stream, a);
}

constexpr int kFinishThreads = 1024;

// Sum over the block, in a fixed order, in all threads. sums: a shared number per warp. Ends with a
// barrier.
__device__ inline double block_sum(double x, double* sums) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += sums[w];
  __syncthreads();
  return total;
}

// How many tokens count. Known to the host where there is no mask.
struct Counted {
  const double* on_device;  // null: `known`
  double known;

  __device__ double get() const { return on_device != nullptr ? *on_device : known; }
};

// Bytes that are not 0, of 4.
__device__ inline int nonzero_bytes(uint32_t x) {
  return __popc((((x & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | x) & 0x80808080u);
}

// One block.
static __global__ void __launch_bounds__(kFinishThreads)
    count_tokens_kernel(const uint8_t* mask, int64_t n, double* out) {
  TENFOLD_SHARED(double, sums, kFinishThreads / 32);
  int64_t mine = 0;
  const int64_t words = reinterpret_cast<uintptr_t>(mask) % 16 == 0 ? n / 16 : 0;
  for (int64_t i = threadIdx.x; i < words; i += kFinishThreads) {
    const uint4 x = reinterpret_cast<const uint4*>(mask)[i];
    mine += nonzero_bytes(x.x) + nonzero_bytes(x.y) + nonzero_bytes(x.z) + nonzero_bytes(x.w);
  }
  for (int64_t i = words * 16 + threadIdx.x; i < n; i += kFinishThreads) mine += mask[i] != 0;
  const double total = block_sum(static_cast<double>(mine), sums);
  if (threadIdx.x == 0) *out = total;
}

inline void launch_count_tokens(const uint8_t* mask, int64_t n, double* out, cudaStream_t stream) {
  TENFOLD_LAUNCH(count_tokens_kernel, 1, kFinishThreads, stream, mask, n, out);
}

// The sum of n parts times `numerator`, over the tokens that count, once or squared; 0 without one.
struct FinishArgs {
  const double* parts;
  int64_t n;
  Counted counted;
  double numerator;
  bool squared;
  float* loss;
};

static __global__ void __launch_bounds__(kFinishThreads) finish_sum_kernel(FinishArgs a) {
  TENFOLD_SHARED(double, sums, kFinishThreads / 32);
  double mine = 0.0;
  for (int64_t i = threadIdx.x; i < a.n; i += kFinishThreads) mine += a.parts[i];
  const double total = block_sum(mine, sums), by = a.counted.get();
  if (threadIdx.x != 0) return;
  const double mean = total * a.numerator / (a.squared ? by * by : by);
  *a.loss = by > 0.0 ? static_cast<float>(mean) : 0.0f;
}

inline void launch_finish_sum(const FinishArgs& a, cudaStream_t stream) {
  TENFOLD_LAUNCH(finish_sum_kernel, 1, kFinishThreads, stream, a);
}

}  // namespace tenfold::cuda
