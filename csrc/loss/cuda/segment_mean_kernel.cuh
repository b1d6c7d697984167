// SPDX-License-Identifier: Apache-2.0
// Device code of segment_mean (loss/segment_mean.h): a block a row. First the extent of every
// segment and how many tokens it has, by whole numbers, from the places where a run of equal
// numbers begins and ends; then a warp a segment adds what lies between its first and its last
// token. No atomics on floats: the same bits every time.
#pragma once

#include "core/convert.cuh"
#include "core/launch.cuh"

namespace tenfold::cuda {

constexpr int kSegmentThreads = 512;
// Segments whose extents are in shared memory; more are in memory of their own.
constexpr int64_t kMostSegmentsShared = 4096;

struct SegmentArgs {
  const float* x;  // [rows, length], or of the backward [rows, segments]
  IntArray seg;
  int64_t rows, length, segments;
  int* spare;  // segment_spare() numbers
  float* out;
};

inline int64_t segment_spare(int64_t rows, int64_t segments) {
  return segments > kMostSegmentsShared ? rows * 3 * segments : 0;
}

struct SegmentExtents {
  int *count, *first, *last;  // [segments]; first: distance from the row's end
};

__device__ inline int64_t segment_of(const SegmentArgs& a, int64_t row, int64_t j) {
  const int64_t s = j >= 0 && j < a.length ? a.seg[row * a.length + j] : -1;
  return s >= 0 && s < a.segments ? s : -1;
}

// Ends with a barrier.
__device__ inline SegmentExtents find_extents(const SegmentArgs& a, int64_t row, int* memory) {
  const int64_t n = a.segments;
  int* const at = n > kMostSegmentsShared ? a.spare + row * 3 * n : memory;
  const SegmentExtents e{at, at + n, at + 2 * n};
  for (int64_t t = threadIdx.x; t < n; t += kSegmentThreads)
    e.count[t] = 0, e.first[t] = -1, e.last[t] = -1;
  __syncthreads();
  for (int64_t j = threadIdx.x; j < a.length; j += kSegmentThreads) {
    const int64_t s = segment_of(a, row, j);
    if (s < 0) continue;
    const int place = static_cast<int>(j);
    if (segment_of(a, row, j - 1) != s) {
      atomicAdd(e.count + s, -place);
      atomicMax(e.first + s, static_cast<int>(a.length) - place);
    }
    if (segment_of(a, row, j + 1) != s) {
      atomicAdd(e.count + s, place + 1);
      atomicMax(e.last + s, place);
    }
  }
  __syncthreads();
  return e;
}

static __global__ void __launch_bounds__(kSegmentThreads) segment_mean_kernel(SegmentArgs a) {
  TENFOLD_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x;
  const SegmentExtents e = find_extents(a, row, reinterpret_cast<int*>(memory));
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t t = threadIdx.x / 32; t < a.segments; t += kSegmentThreads / 32) {
    double sum = 0.0;
    const int count = e.count[t];
    const int64_t begin = a.length - e.first[t], end = e.last[t];
    // Lanes begin with the segment, not with the row: a mean does not depend on its place.
    for (int64_t j = begin + lane; count > 0 && j <= end; j += 32)
      if (segment_of(a, row, j) == t) sum += a.x[row * a.length + j];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (lane == 0) a.out[row * a.segments + t] = count > 0 ? static_cast<float>(sum / count) : 0.0f;
  }
}

static __global__ void __launch_bounds__(kSegmentThreads)
    segment_mean_backward_kernel(SegmentArgs a) {
  TENFOLD_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x;
  const SegmentExtents e = find_extents(a, row, reinterpret_cast<int*>(memory));
  for (int64_t j = threadIdx.x; j < a.length; j += kSegmentThreads) {
    const int64_t s = segment_of(a, row, j);
    a.out[row * a.length + j] =
        s >= 0 ? a.x[row * a.segments + s] / static_cast<float>(e.count[s]) : 0.0f;
  }
}

inline void launch_segment_mean(const SegmentArgs& a, bool backward, cudaStream_t stream) {
  if (a.rows == 0) return;
  constexpr int64_t kMost = 12 * kMostSegmentsShared;
  const int64_t bytes = a.segments > kMostSegmentsShared ? 0 : 12 * a.segments;
  const auto kernel = backward ? segment_mean_backward_kernel : segment_mean_kernel;
  TENFOLD_LAUNCH_SHARED(kernel, static_cast<unsigned>(a.rows), kSegmentThreads, bytes, kMost,
                        stream, a);
}

}  // namespace tenfold::cuda
