// SPDX-License-Identifier: Apache-2.0
// Sums and maxima of a block in a fixed order, in all of its threads.
#pragma once

#include "core/launch.cuh"

namespace tenfold::cuda {

template <class T>
__device__ inline T larger(T a, T b) {
  return b > a ? b : a;
}

// `memory`: kThreads / 32 shared numbers. Begins and ends with a barrier.
template <int kThreads, class T, class Join>
__device__ inline T block_join(T x, T* memory, Join join) {
  for (int step = 16; step > 0; step /= 2) x = join(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = x;
  __syncthreads();
  T all = memory[0];
  for (int w = 1; w < kThreads / 32; ++w) all = join(all, memory[w]);
  __syncthreads();
  return all;
}

template <int kThreads, class T>
__device__ inline T block_sum(T x, T* memory) {
  return block_join<kThreads>(x, memory, [](T a, T b) { return a + b; });
}

template <int kThreads, class T>
__device__ inline T block_max(T x, T* memory) {
  return block_join<kThreads>(x, memory, [](T a, T b) { return larger(a, b); });
}

}  // namespace tenfold::cuda
