// SPDX-License-Identifier: Apache-2.0
// What the kernels of the family share: factors as the numbers that are computed with, batches of
// ids, and sums of the rows that they choose.
#pragma once

#include "core/convert.cuh"
#include "influence/markov.h"

namespace tenfold::cuda {

__device__ inline double widen(double x) {
  return x;
}
template <class T>
__device__ inline float widen(T x) {
  return to_float(x);
}
__device__ inline void narrow(double x, double* out) {
  *out = x;
}
template <class T>
__device__ inline void narrow(float x, T* out) {
  from_float(x, out);
}

__device__ inline float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ inline double fused(double a, double b, double c) {
  return fma(a, b, c);
}

// i / by and i % by, in 32 bits where both fit: a 64-bit division takes five times as long.
struct Split {
  int64_t whole, rest;
};
__device__ inline Split split(int64_t i, int64_t by) {
  if (static_cast<uint64_t>(i | by) >> 32 == 0) {
    const auto a = static_cast<uint32_t>(i), b = static_cast<uint32_t>(by);
    return {a / b, a % b};
  }
  return {i / by, i % by};
}

// Ids of batches [count, size], contiguous; what is outside [0, rows) is none.
struct Batches {
  IntArray ids;
  int64_t size, rows;
  bool mean;

  __device__ int64_t id(int64_t entry) const {
    const int64_t i = ids[entry];
    return i >= 0 && i < rows ? i : -1;
  }
  // 1, or what makes a mean of the sum over a batch.
  template <class R>
  __device__ R weight(int64_t batch) const {
    if (!mean) return R{1};
    int64_t count = 0;
    for (int64_t b = 0; b < size; ++b) count += id(batch * size + b) >= 0 ? 1 : 0;
    return R{1} / static_cast<R>(count > 0 ? count : 1);
  }
  // Sum over a batch of element 0 of the rows that lie `stride` apart.
  template <class T>
  __device__ Real<T> sum(int64_t batch, const T* from, int64_t stride) const {
    Real<T> all{0};
#pragma unroll 4
    for (int64_t b = 0; b < size; ++b) {
      const int64_t i = id(batch * size + b);
      if (i >= 0) all += widen(from[i * stride]);
    }
    return all;
  }
};

constexpr int kFlatThreads = 256;
inline int64_t flat_blocks(int64_t n) {
  return (n + kFlatThreads - 1) / kFlatThreads;
}
// The number of this thread in a launch over all elements of something.
__device__ inline int64_t flat_index() {
  return static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
}

}  // namespace tenfold::cuda
