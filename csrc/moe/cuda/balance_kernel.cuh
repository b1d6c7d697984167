// SPDX-License-Identifier: Apache-2.0
// Device code of load_balance_loss: one number per token that counts, from its logits in registers;
// sums per block in double, and one block that adds those in a fixed order. Counts are used as they
// are: what they are divided by may be known to the device only.
#pragma once

#include "moe/cuda/gate_rows.cuh"
#include "moe/cuda/sum_parts.cuh"

namespace tenfold::cuda {

constexpr int kBalanceThreads = 256, kBalanceSteps = 4;  // steps: tokens of a lane

struct BalanceArgs {
  const void* logits;
  int64_t tokens, stride, experts;
  bool wide, wide_out;
  int lanes;
  IntArray counts;      // [n]
  const uint8_t* mask;  // [T]; null: all tokens count
  double* parts;        // of the blocks: the loss
  Counted counted;      // the gradient
  double numerator;
  const float* grad;
  void* out;  // [T, n]
};

template <class T>
BalanceArgs with_shape(BalanceArgs a) {
  a.lanes = gate_lanes(a.experts);
  a.wide = wide_rows<T, kGateUnit>(a.logits, a.stride, a.experts);
  a.wide_out = wide_rows<T, kGateUnit>(a.out, a.experts, a.experts);
  return a;
}

inline int64_t balance_blocks(const BalanceArgs& a) {
  const int64_t each = kBalanceThreads / a.lanes * kBalanceSteps;
  return (a.tokens + each - 1) / each;
}

// The counts of a lane's experts.
template <int kUnits>
struct LaneCounts {
  const BalanceArgs& a;
  float held[kUnits > 0 ? kUnits : 1][kGateUnit];

  __device__ LaneCounts(const BalanceArgs& a, const GateLane& at) : a(a) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) read((u * at.lanes + at.lane) * kGateUnit, held[u]);
  }
  __device__ void read(int64_t i, float (&x)[kGateUnit]) const {
#pragma unroll
    for (int q = 0; q < kGateUnit; ++q)
      x[q] = i + q < a.experts ? static_cast<float>(a.counts[i + q]) : 0.0f;
  }
  // Of the experts from i on; unit: the how manieth of this lane.
  __device__ void get(int64_t i, int unit, float (&x)[kGateUnit]) const {
    if constexpr (kUnits == 0) {
      read(i, x);
    } else {
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int q = 0; q < kGateUnit; ++q)
          if (u == unit) x[q] = held[u][q];
    }
  }
};

// sum of P count
template <class T, int kUnits>
__device__ inline float mean_count(const GateRow<T, kUnits>& row, const GateLane& at,
                                   const RowSoftmax& softmax, const LaneCounts<kUnits>& counts) {
  GateSum<kUnits> sum = 0;
  int unit = 0;
  row.each([&](int64_t i, const float (&x)[kGateUnit]) {
    float c[kGateUnit], y[kGateUnit];
    counts.get(i, unit++, c);
#pragma unroll
    for (int q = 0; q < kGateUnit; ++q) y[q] = i + q < row.n ? softmax(x[q]) * c[q] : 0.0f;
    sum += (y[0] + y[1]) + (y[2] + y[3]);
  });
  return static_cast<float>(at.sum(sum));
}

template <class T, int kUnits>
__global__ void __launch_bounds__(kBalanceThreads) balance_kernel(BalanceArgs a) {
  TENFOLD_SHARED(double, sums, kBalanceThreads / 32);
  const GateLane at(a.lanes);
  const LaneCounts<kUnits> counts(a, at);
  const int64_t groups = kBalanceThreads / a.lanes;
  const int64_t first = blockIdx.x * groups * kBalanceSteps + threadIdx.x / a.lanes;
  double mine = 0.0;
#pragma unroll 1
  for (int step = 0; step < kBalanceSteps; ++step) {
    const int64_t t = first + step * groups;
    const bool counted = t < a.tokens && (a.mask == nullptr || a.mask[t] != 0);
    const GateRow<T, kUnits> row(static_cast<const T*>(a.logits) + (counted ? t * a.stride : 0),
                                 counted ? a.experts : 0, a.wide, at);
    const RowSoftmax softmax = row_softmax(row, at);
    const float mean = mean_count(row, at, softmax, counts);
    if (counted && at.lane == 0) mine += mean;
  }
  const double total = block_sum(mine, sums);
  if (threadIdx.x == 0) a.parts[blockIdx.x] = total;
}

template <class T, int kUnits>
__global__ void __launch_bounds__(kBalanceThreads) balance_grad_kernel(BalanceArgs a) {
  const GateLane at(a.lanes);
  const LaneCounts<kUnits> counts(a, at);
  const double tokens = a.counted.get();
  const auto by = static_cast<float>(
      tokens > 0.0 ? static_cast<double>(*a.grad) * a.numerator / (tokens * tokens) : 0.0);
  const int64_t groups = kBalanceThreads / a.lanes;
  const int64_t first = blockIdx.x * groups * kBalanceSteps + threadIdx.x / a.lanes;
#pragma unroll 1
  for (int step = 0; step < kBalanceSteps; ++step) {
    const int64_t t = first + step * groups;
    const bool exists = t < a.tokens, counted = exists && (a.mask == nullptr || a.mask[t] != 0);
    const GateRow<T, kUnits> row(static_cast<const T*>(a.logits) + (counted ? t * a.stride : 0),
                                 counted ? a.experts : 0, a.wide, at);
    const RowSoftmax softmax = row_softmax(row, at);
    const float mean = mean_count(row, at, softmax, counts);
    if (!exists) continue;
    T* const out = static_cast<T*>(a.out) + t * a.experts;
    if (!counted) {
      const float none[kGateUnit] = {};
      for (int64_t i = row.first(0); i < a.experts; i += a.lanes * kGateUnit)
        store_some(none, out + i, a.experts - i, a.wide_out);
      continue;
    }
    int unit = 0;
    row.each([&](int64_t i, const float (&x)[kGateUnit]) {
      float c[kGateUnit], y[kGateUnit];
      counts.get(i, unit++, c);
#pragma unroll
      for (int q = 0; q < kGateUnit; ++q) y[q] = softmax(x[q]) * by * (c[q] - mean);
      if (i < a.experts) store_some(y, out + i, a.experts - i, a.wide_out);
    });
  }
}

template <class T>
void launch_balance(const BalanceArgs& a, float* loss, cudaStream_t stream) {  // of with_shape
  const int64_t blocks = balance_blocks(a);
  if (blocks > 0)
    with_units(a.experts, [&]<int kUnits>() {
      TENFOLD_LAUNCH((balance_kernel<T, kUnits>), static_cast<unsigned>(blocks), kBalanceThreads,
                     stream, a);
    });
  launch_finish_sum({a.parts, blocks, a.counted, a.numerator, true, loss}, stream);
}

template <class T>
void launch_balance_grad(const BalanceArgs& a, cudaStream_t stream) {  // of with_shape
  const int64_t blocks = balance_blocks(a);
  if (blocks == 0) return;
  with_units(a.experts, [&]<int kUnits>() {
    TENFOLD_LAUNCH((balance_grad_kernel<T, kUnits>), static_cast<unsigned>(blocks), kBalanceThreads,
                   stream, a);
  });
}

}  // namespace tenfold::cuda
