// SPDX-License-Identifier: Apache-2.0
// Device code of fusion_mse and its backward: a block per row j of a group's omega, a thread per
// dim; then one thread per group adds the rows in order.
#pragma once

#include "attention/fusion_mse.h"
#include "core/convert.cuh"

namespace tenfold::cuda {

struct FusionMseArgs {
  const float* omega;  // [N, g, g, d]
  float* partial;      // [N, g]
  float* mse;          // [N]
  const float* dout;   // [N], stride dout_stride
  int64_t dout_stride;
  float* domega;  // [N, g, g, d]
  int64_t num_groups, size, dims;
  double scale;  // fusion_mse_scale(g, d)
};

constexpr int kMseThreads = 128;

__device__ inline float mean_over_heads(const float* at, int64_t stride, int64_t heads) {
  float sum = 0.0f;
  for (int64_t h = 0; h < heads; ++h) sum += at[h * stride];
  return sum / static_cast<float>(heads);
}

__global__ void __launch_bounds__(kMseThreads) fusion_mse_rows_kernel(FusionMseArgs a) {
  TENFOLD_SHARED(float, warp_sums, kMseThreads / 32);
  const int64_t n = blockIdx.x / a.size, j = blockIdx.x % a.size, stride = a.size * a.dims;
  const float* row = a.omega + (n * a.size * a.size + j) * a.dims;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < a.dims; i += kMseThreads) {
    const float mean = mean_over_heads(row + i, stride, a.size);
    for (int64_t h = 0; h < a.size; ++h) {
      const float apart = row[i + h * stride] - mean;
      sum += apart * apart;
    }
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int warp = 0; warp < kMseThreads / 32; ++warp) total += warp_sums[warp];
  a.partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kMseThreads) fusion_mse_sum_kernel(FusionMseArgs a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kMseThreads + threadIdx.x;
  if (n >= a.num_groups) return;
  double sum = 0.0;
  for (int64_t j = 0; j < a.size; ++j) sum += a.partial[n * a.size + j];
  a.mse[n] = a.size < 2 ? 0.0f : static_cast<float>(sum * a.scale);
}

__global__ void __launch_bounds__(kMseThreads) fusion_mse_backward_kernel(FusionMseArgs a) {
  const int64_t n = blockIdx.x / a.size, j = blockIdx.x % a.size, stride = a.size * a.dims;
  const int64_t at = (n * a.size * a.size + j) * a.dims;
  const auto factor = static_cast<float>(a.dout[n * a.dout_stride] * (2.0 * a.scale));
  for (int64_t i = threadIdx.x; i < a.dims; i += kMseThreads) {
    const float mean = mean_over_heads(a.omega + at + i, stride, a.size);
    for (int64_t h = 0; h < a.size; ++h)
      a.domega[at + i + h * stride] = (a.omega[at + i + h * stride] - mean) * factor;
  }
}

inline void launch_fusion_mse(const FusionMseArgs& a, cudaStream_t stream) {
  if (a.num_groups == 0) return;
  const auto rows = static_cast<unsigned>(a.num_groups * a.size);
  const auto blocks = static_cast<unsigned>((a.num_groups + kMseThreads - 1) / kMseThreads);
  TENFOLD_LAUNCH(fusion_mse_rows_kernel, rows, kMseThreads, stream, a);
  TENFOLD_LAUNCH(fusion_mse_sum_kernel, blocks, kMseThreads, stream, a);
}

inline void launch_fusion_mse_backward(const FusionMseArgs& a, cudaStream_t stream) {
  if (a.num_groups == 0) return;
  const auto rows = static_cast<unsigned>(a.num_groups * a.size);
  TENFOLD_LAUNCH(fusion_mse_backward_kernel, rows, kMseThreads, stream, a);
}

}  // namespace tenfold::cuda
