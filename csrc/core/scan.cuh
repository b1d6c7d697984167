// SPDX-License-Identifier: Apache-2.0
// Sums of a block and running sums, in integers: the order does not matter.
#pragma once

#include "core/launch.cuh"

namespace tenfold::cuda {

__device__ inline int64_t warp_sum(int64_t x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// Sum of the lanes before this one, and of all in *total.
__device__ inline int64_t warp_before(int64_t x, int64_t* total) {
  const int lane = threadIdx.x % 32;
  int64_t up_to = x;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_sync(0xFFFFFFFFu, up_to, lane >= step ? lane - step : lane);
    if (lane >= step) up_to += other;
  }
  *total = __shfl_sync(0xFFFFFFFFu, up_to, 31);
  return up_to - x;
}

// Sum of the threads before this one, and of all in *total. `sums`: kThreads / 32 shared numbers.
// Ends with a barrier.
template <int kThreads>
__device__ inline int64_t block_before(int64_t x, int64_t* sums, int64_t* total) {
  const int warp = threadIdx.x / 32;
  int64_t mine;
  int64_t before = warp_before(x, &mine);
  if (threadIdx.x % 32 == 0) sums[warp] = mine;
  __syncthreads();
  *total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += sums[w];
    *total += sums[w];
  }
  __syncthreads();
  return before;
}

constexpr int kScanThreads = 1024;

// In place: counts[i] = sum of the counts before i, of every row of n. One block a row.
static __global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t* counts, int64_t n) {
  TENFOLD_SHARED(int64_t, sums, kScanThreads / 32);
  counts += blockIdx.x * n;
  int64_t carry = 0;
  for (int64_t first = 0; first < n; first += kScanThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t total;
    const int64_t before = block_before<kScanThreads>(i < n ? counts[i] : 0, sums, &total);
    if (i < n) counts[i] = carry + before;
    carry += total;
  }
}

inline void launch_scan(int64_t* counts, int64_t n, cudaStream_t stream, int rows = 1) {
  if (n > 0 && rows > 0)
    TENFOLD_LAUNCH(scan_kernel, static_cast<unsigned>(rows), kScanThreads, stream, counts, n);
}

}  // namespace tenfold::cuda
