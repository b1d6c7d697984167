// SPDX-License-Identifier: Apache-2.0
// Rows of n logits over lanes: a token has a power of two of neighbouring lanes, each of which
// holds units of kGateUnit neighbouring logits in registers. Rows of more than 2 units a lane are
// read again for each look at them, from the first cache. Who adds what depends on n alone.
#pragma once

#include "core/vectors.cuh"

namespace tenfold::cuda {

constexpr int kGateUnit = 4;
constexpr float kNothing = -INFINITY;

inline int gate_lanes(int64_t n) {
  int lanes = 1;
  while (lanes < 32 && lanes * kGateUnit < n) lanes *= 2;
  return lanes;
}

// Calls f<units>() with the units of a lane; 0: a row that is read again.
template <class F>
void with_units(int64_t n, F&& f) {
  if (n <= 32 * kGateUnit) return f.template operator()<1>();
  if (n <= 64 * kGateUnit) return f.template operator()<2>();
  f.template operator()<0>();
}

struct GateLane {
  int lanes, lane;
  int64_t group;  // of the grid

  __device__ explicit GateLane(int lanes) : lanes(lanes) {
    lane = static_cast<int>(threadIdx.x) % lanes;
    group = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  }
  template <class X>
  __device__ X sum(X x) const {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
  }
  __device__ float max(float x) const {
    for (int step = lanes / 2; step > 0; step /= 2)
      x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
  }
  __device__ uint64_t max(uint64_t x) const {
    for (int step = lanes / 2; step > 0; step /= 2) {
      const uint64_t other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
  __device__ bool any(bool x) const {
    const uint32_t bits = __ballot_sync(0xFFFFFFFFu, x);
    const int first = static_cast<int>(threadIdx.x) % 32 / lanes * lanes;
    return (bits >> first & (0xFFFFFFFFu >> (32 - lanes))) != 0;
  }
};

template <class T, int kUnits>
struct GateRow {
  const T* row;
  int64_t n;  // 0: no row; nothing is read
  int lanes, lane;
  bool wide;
  float held[kUnits > 0 ? kUnits : 1][kGateUnit];

  __device__ GateRow(const T* row, int64_t n, bool wide, const GateLane& at)
      : row(row), n(n), lanes(at.lanes), lane(at.lane), wide(wide) {
    if constexpr (kUnits > 0) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int64_t i = first(u);
        load_some(row + (i < n ? i : 0), n - i, wide, held[u], kNothing);
      }
    }
  }

  __device__ int64_t first(int u) const { return (u * lanes + lane) * kGateUnit; }

  // f(number of the first, kGateUnit logits), -inf beyond the last.
  template <class F>
  __device__ void each(const F& f) const {
    if constexpr (kUnits > 0) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) f(first(u), held[u]);
    } else {
      for (int64_t i = first(0); i < n; i += lanes * kGateUnit) {
        float x[kGateUnit];
        load_some(row + i, n - i, wide, x, kNothing);
        f(i, x);
      }
    }
  }
};

// Of a long row a lane adds many numbers.
template <int kUnits>
using GateSum = std::conditional_t<kUnits == 0, double, float>;

// largest logit, 1 / the sum of exp(x - largest)
struct RowSoftmax {
  float largest, factor;

  __device__ float operator()(float x) const { return expf(x - largest) * factor; }
};

template <class T, int kUnits>
__device__ inline RowSoftmax row_softmax(const GateRow<T, kUnits>& row, const GateLane& at) {
  float top = kNothing;
  row.each([&](int64_t, const float (&x)[kGateUnit]) {
    top = fmaxf(top, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
  });
  top = at.max(top);
  GateSum<kUnits> sum = 0;
  row.each([&](int64_t i, const float (&x)[kGateUnit]) {
    float y[kGateUnit];
#pragma unroll
    for (int q = 0; q < kGateUnit; ++q) y[q] = i + q < row.n ? expf(x[q] - top) : 0.0f;
    sum += (y[0] + y[1]) + (y[2] + y[3]);
  });
  return {top, static_cast<float>(1 / at.sum(sum))};
}

}  // namespace tenfold::cuda
