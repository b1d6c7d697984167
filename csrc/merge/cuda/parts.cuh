// SPDX-License-Identifier: Apache-2.0
// Sums of float64 over whole tensors: blocks, as many as the size alone says, each leave a part,
// and parts are added in a fixed order.
#pragma once

#include "core/launch.cuh"

namespace tenfold::cuda {

constexpr int64_t kMostParts = 528;  // 4 blocks on each of 132 multiprocessors

// Blocks over n elements, `each` of them at a time.
inline int64_t part_blocks(int64_t n, int64_t each) {
  const int64_t blocks = (n + each - 1) / each;
  return blocks < kMostParts ? blocks : kMostParts;
}

__device__ inline double warp_total(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// By a warp: the sum of count parts, `step` apart, in all lanes.
__device__ inline double sum_of_parts(const double* parts, int64_t count, int64_t step) {
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < count; i += 32) sum += parts[i * step];
  return warp_total(sum);
}

}  // namespace tenfold::cuda
