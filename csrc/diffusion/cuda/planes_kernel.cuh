// SPDX-License-Identifier: Apache-2.0
// Device code of the parts of conv1d_planes (diffusion/planes.h).
#pragma once

#include "core/block_sums.cuh"
#include "core/vectors.cuh"
#include "diffusion/planes.h"

namespace tenfold::cuda {

constexpr int kPlanesThreads = 256;

struct PlanesAddArgs {
  void* y;            // [rows, length]
  const float* taps;  // [rows, size]
  const void* bias;   // [channels], dtype of y; or null
  int64_t rows, channels, length, size;
  bool edges_only, wide;  // wide: set by the launch
};

// Items of a row: vectors, or positions at its ends.
template <class T>
TENFOLD_HD int64_t planes_items(const PlanesAddArgs& a) {
  const int64_t ends = a.size - 1;
  if (a.edges_only) return ends < a.length ? ends : a.length;
  return (a.length + kPerVector<T> - 1) / kPerVector<T>;
}
template <class T>
int64_t planes_blocks(const PlanesAddArgs& a) {
  return (a.rows * planes_items<T>(a) + kPlanesThreads - 1) / kPlanesThreads;
}

template <class T>
__global__ void __launch_bounds__(kPlanesThreads) planes_add_kernel(PlanesAddArgs a) {
  constexpr int kEach = kPerVector<T>;
  const int64_t items = planes_items<T>(a);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kPlanesThreads + threadIdx.x;
  if (item >= a.rows * items) return;
  const int64_t row = item / items, i = item - row * items;
  const float* const taps = a.taps + row * a.size;
  T* const y = static_cast<T*>(a.y) + row * a.length;
  const float whole = planes_at(taps, a.size, a.size / 2, a.length + a.size);
  if (a.edges_only) {
    const int64_t pad = a.size / 2, l = i < pad || a.length < a.size ? i : a.length - items + i;
    from_float(to_float(y[l]) + (planes_at(taps, a.size, l, a.length) - whole), y + l);
    return;
  }
  const float bias =
      a.bias != nullptr ? to_float(static_cast<const T*>(a.bias)[row % a.channels]) : 0.0f;
  float x[kEach];
  const int64_t first = i * kEach, left = a.length - first;
  load_some<T, kEach>(y + first, left, a.wide, x);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t l = first + k;
    x[k] += planes_whole(a.size, l, a.length) || l >= a.length
                ? whole + bias
                : planes_at(taps, a.size, l, a.length) + bias;
  }
  store_some<T, kEach>(x, y + first, left, a.wide);
}

template <class T>
void launch_planes_add(PlanesAddArgs a, cudaStream_t stream) {
  if (a.rows * planes_items<T>(a) == 0) return;
  a.wide = wide_rows<T, kPerVector<T>>(a.y, a.length, a.length);
  TENFOLD_LAUNCH((planes_add_kernel<T>), static_cast<unsigned>(planes_blocks<T>(a)), kPlanesThreads,
                 stream, a);
}

struct PlanesSumsArgs {
  const void* grad;  // [rows, length]
  float* sums;       // [rows, size]
  int64_t rows, length, size;
};

// A block has a row: the sum of its middle, then what each tap sees of the ends.
template <class T>
__global__ void __launch_bounds__(kPlanesThreads) planes_sums_kernel(PlanesSumsArgs a) {
  TENFOLD_SHARED(double, memory, kPlanesThreads / 32);
  const int64_t row = blockIdx.x, pad = a.size / 2;
  const T* const g = static_cast<const T*>(a.grad) + row * a.length;
  const int64_t low = pad < a.length ? pad : a.length;
  const int64_t high = a.length - pad > low ? a.length - pad : low;
  double mine = 0.0;
  for (int64_t first = low + threadIdx.x; first < high; first += 8 * kPlanesThreads) {
    float some = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int64_t l = first + static_cast<int64_t>(k) * kPlanesThreads;
      if (l < high) some += to_float(g[l]);
    }
    mine += some;
  }
  const double middle = block_sum<kPlanesThreads>(mine, memory);
  for (int64_t k = threadIdx.x; k < a.size; k += kPlanesThreads) {
    double total = middle;
    const auto end = [&](int64_t l) {
      const int64_t at = l + k - pad;
      if (at >= 0 && at < a.length) total += to_float(g[l]);
    };
    for (int64_t l = 0; l < low; ++l) end(l);
    for (int64_t l = high; l < a.length; ++l) end(l);
    a.sums[row * a.size + k] = static_cast<float>(total);
  }
}

template <class T>
void launch_planes_sums(const PlanesSumsArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  TENFOLD_LAUNCH((planes_sums_kernel<T>), static_cast<unsigned>(a.rows), kPlanesThreads, stream, a);
}

}  // namespace tenfold::cuda
