// SPDX-License-Identifier: Apache-2.0
// What the kernels of the family know of a softmax.
#pragma once

#include "core/launch.cuh"
#include "loss/selective_logprob.h"

namespace tenfold::cuda {

constexpr float kLowestFloat = -3.402823466e38f, kLog2E = 1.44269504f;
constexpr double kLn2 = 0.693147180559945309;
// Below which 2^x is 0: what stands for -inf where that would be multiplied by 0.
constexpr float kZeroExponent = -1000.0f;

// Sums of n parts, in a fixed order, complete in all lanes of a warp. part(i): those of part i.
template <class Part>
__device__ inline LogitSums join_in_warp(int n, const Part& part) {
  const int lane = threadIdx.x % 32;
  double max = -INFINITY;
  for (int i = lane; i < n; i += 32) {
    const double other = part(i).max;
    max = other > max ? other : max;
  }
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(0xFFFFFFFFu, max, step);
    max = other > max ? other : max;
  }
  LogitSums all{max, 0.0, 0.0};
  for (int i = lane; i < n; i += 32) {
    const LogitSums one = part(i);
    if (!(one.max > -INFINITY)) continue;
    const LogitSums moved = seen_from(max, one);
    all.sum += moved.sum;
    all.weighted += moved.weighted;
  }
  for (int step = 16; step > 0; step /= 2) {
    all.sum += __shfl_xor_sync(0xFFFFFFFFu, all.sum, step);
    all.weighted += __shfl_xor_sync(0xFFFFFFFFu, all.weighted, step);
  }
  return all;
}

}  // namespace tenfold::cuda
