// SPDX-License-Identifier: Apache-2.0
// Running sums over a row by one block. A row is read in tiles of kRowThreads, one item per thread,
// and every scan carries its state from tile to tile. All threads of the block take every step.
//
// A step has one barrier. Its shared memory alternates between two halves, so the next step of the
// same object needs no other; before another object uses the same memory there must be one.
#pragma once

#include "core/launch.cuh"

namespace tenfold::cuda {

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / 32;

__device__ inline int lane_of_thread() {
  return static_cast<int>(threadIdx.x % 32);
}

__device__ inline int warp_of_thread() {
  return static_cast<int>(threadIdx.x / 32);
}

// Position of the highest set bit, -1 of 0.
__device__ inline int highest_bit(uint32_t x) {
  for (int step = 1; step < 32; step *= 2) x |= x >> step;
  return __popc(x) - 1;
}

// x of the lane `step` before this one; the first ones get their own.
template <class T>
__device__ inline T from_before(T x, int step) {
  const int lane = lane_of_thread();
  return __shfl_sync(0xFFFFFFFFu, x, lane >= step ? lane - step : lane);
}

// Of the marked items before one: how many there are, and which is the last.
struct MarkScan {
  static constexpr int kInts = 4 * kRowWarps;

  int32_t* memory;               // kInts shared numbers
  int32_t count = 0, last = -1;  // up to the end of the last tile
  int turn = 0;

  // `first`: number of the tile's first item.
  __device__ inline void step(bool marked, int32_t first, int32_t* count_before,
                              int32_t* last_before) {
    const int lane = lane_of_thread(), warp = warp_of_thread();
    int32_t *const counts = memory + turn * 2 * kRowWarps, *const lasts = counts + kRowWarps;
    turn ^= 1;
    const uint32_t bits = __ballot_sync(0xFFFFFFFFu, marked);
    const uint32_t mine = bits & ((1u << lane) - 1u);
    const int32_t origin = first + warp * 32;
    if (lane == 0) {
      counts[warp] = __popc(bits);
      lasts[warp] = bits != 0 ? origin + highest_bit(bits) : -1;
    }
    __syncthreads();
    for (int w = 0; w < kRowWarps; ++w) {
      if (w == warp) {
        *count_before = count + __popc(mine);
        *last_before = mine != 0 ? origin + highest_bit(mine) : last;
      }
      count += counts[w];
      if (lasts[w] >= 0) last = lasts[w];
    }
  }
};

// Sums of kSums numbers per item, since the last head.
template <int kSums>
struct SegmentScan {
  static constexpr int kDoubles = 2 * kRowWarps * (kSums + 1);

  double* memory;  // kDoubles shared numbers
  double carry[kSums] = {};
  int turn = 0;

  // x becomes the sum from the last head up to and with this item.
  __device__ inline void step(bool head, double (&x)[kSums]) {
    const int lane = lane_of_thread(), warp = warp_of_thread();
    double* const of_warps = memory + turn * kRowWarps * (kSums + 1);
    turn ^= 1;
    const uint32_t heads = __ballot_sync(0xFFFFFFFFu, head);
    const int start = highest_bit(heads & (0xFFFFFFFFu >> (31 - lane)));
    for (int step = 1; step < 32; step *= 2)
      for (int i = 0; i < kSums; ++i) {
        const double other = from_before(x[i], step);
        if (lane - step >= (start > 0 ? start : 0)) x[i] += other;
      }
    if (lane == 31) {
      for (int i = 0; i < kSums; ++i) of_warps[warp * (kSums + 1) + i] = x[i];
      of_warps[warp * (kSums + 1) + kSums] = heads != 0 ? 1.0 : 0.0;
    }
    __syncthreads();
    for (int w = 0; w < kRowWarps; ++w) {
      const double* const sum = of_warps + w * (kSums + 1);
      for (int i = 0; i < kSums; ++i) {
        if (w == warp && start < 0) x[i] += carry[i];
        carry[i] = sum[kSums] != 0.0 ? sum[i] : carry[i] + sum[i];
      }
    }
  }
};

// x_i = d_i + c_i x_{i-1} with x_{-1} = 0.
struct AffineScan {
  static constexpr int kDoubles = 4 * kRowWarps;

  double* memory;  // kDoubles shared numbers
  double carry = 0.0;
  int turn = 0;

  // Of this item, and of the one before it.
  __device__ inline double step(double c, double d, double* before) {
    const int lane = lane_of_thread(), warp = warp_of_thread();
    double* const of_warps = memory + turn * 2 * kRowWarps;
    turn ^= 1;
    for (int step = 1; step < 32; step *= 2) {
      const double c_before = from_before(c, step), d_before = from_before(d, step);
      if (lane >= step) d += c * d_before, c *= c_before;
    }
    double c_before = from_before(c, 1), d_before = from_before(d, 1);
    if (lane == 0) c_before = 1.0, d_before = 0.0;
    if (lane == 31) of_warps[2 * warp] = c, of_warps[2 * warp + 1] = d;
    __syncthreads();
    double mine = 0.0;
    for (int w = 0; w < kRowWarps; ++w) {
      if (w == warp) mine = carry;
      carry = of_warps[2 * w + 1] + of_warps[2 * w] * carry;
    }
    *before = d_before + c_before * mine;
    return d + c * mine;
  }
};

// Sum over the block, in a fixed order, in all threads. `sums`: kRowWarps shared numbers. Begins
// and ends with a barrier.
__device__ inline double row_sum(double x, double* sums) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  __syncthreads();
  if (lane_of_thread() == 0) sums[warp_of_thread()] = x;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kRowWarps; ++w) total += sums[w];
  __syncthreads();
  return total;
}

__device__ inline double row_max(double x, double* sums) {
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (lane_of_thread() == 0) sums[warp_of_thread()] = x;
  __syncthreads();
  double most = sums[0];
  for (int w = 1; w < kRowWarps; ++w) most = sums[w] > most ? sums[w] : most;
  __syncthreads();
  return most;
}

}  // namespace tenfold::cuda
