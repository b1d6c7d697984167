// SPDX-License-Identifier: Apache-2.0
// Device code of moe_gate and its backward. The k largest of a row are found one after the other:
// each lane looks for its best among those behind the last one found, in the order (logit, then
// lower index), and the lanes of the token agree.
#pragma once

#include "moe/cuda/gate_rows.cuh"

namespace tenfold::cuda {

constexpr int kGateThreads = 128;

struct GateArgs {
  const void* logits;
  int64_t tokens, stride, experts, k;
  bool renormalize, wide;  // wide: rows take wide loads
  int lanes;
  float* weight;
  int32_t* index;
};

template <class T>
GateArgs gate_args(const void* logits, int64_t tokens, int64_t stride, int64_t experts, int64_t k,
                   bool renormalize, float* weight, int32_t* index) {
  return {logits,
          tokens,
          stride,
          experts,
          k,
          renormalize,
          wide_rows<T, kGateUnit>(logits, stride, experts),
          gate_lanes(experts),
          weight,
          index};
}

// Of one token; without one (row.n = 0) nothing is written. All lanes of the warp together.
template <class T, int kUnits>
__device__ inline void gate_row(const GateRow<T, kUnits>& row, const GateLane& at, int64_t k,
                                bool renormalize, float* weight, int32_t* index) {
  bool nan = false;
  row.each([&](int64_t, const float (&x)[kGateUnit]) {
#pragma unroll
    for (int q = 0; q < kGateUnit; ++q) nan |= x[q] != x[q];
  });
  nan = at.any(nan);
  uint32_t last_key = 0xFFFFFFFFu, mine_id = 0;
  int64_t last = -1;
  float top = 0.0f, mine = 0.0f;
  double sum = 0.0;
  for (int64_t j = 0; j < k; ++j) {
    uint32_t key = 0, id = 0;
    row.each([&](int64_t i, const float (&x)[kGateUnit]) {
#pragma unroll
      for (int q = 0; q < kGateUnit; ++q) {
        const uint32_t other = i + q < row.n ? sortable_key(x[q]) : 0;
        const bool behind = other < last_key || (other == last_key && i + q > last);
        if (behind && other > key) key = other, id = static_cast<uint32_t>(i + q);
      }
    });
    const uint64_t best = at.max(static_cast<uint64_t>(key) << 32 | (0xFFFFFFFFu - id));
    last_key = static_cast<uint32_t>(best >> 32);
    last = 0xFFFFFFFFu - static_cast<uint32_t>(best);
    const float value = from_sortable_key(last_key);
    if (j == 0) top = value;
    const float y = expf(value - top);
    sum += y;
    const int owner = static_cast<int>(j % at.lanes);
    if (at.lane == owner) mine = y, mine_id = static_cast<uint32_t>(last);
    if (owner + 1 < at.lanes && j + 1 < k) continue;
    const int64_t place = j - owner + at.lane;  // each lane has one to write
    if (row.n == 0 || place > j) continue;
    index[place] = static_cast<int32_t>(mine_id);
    if (k > at.lanes) weight[place] = mine;
  }
  if (!renormalize) {
    GateSum<kUnits> all = 0;
    row.each([&](int64_t i, const float (&x)[kGateUnit]) {
      float y[kGateUnit];
#pragma unroll
      for (int q = 0; q < kGateUnit; ++q) y[q] = i + q < row.n ? expf(x[q] - top) : 0.0f;
      all += (y[0] + y[1]) + (y[2] + y[3]);
    });
    sum = at.sum(all);
  }
  if (row.n == 0) return;
  const auto by = static_cast<float>(sum);
  for (int64_t j = at.lane; j < k; j += at.lanes)
    weight[j] = nan ? NAN : (k > at.lanes ? weight[j] : mine) / by;
}

template <class T, int kUnits>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(GateArgs a) {
  const GateLane at(a.lanes);
  const int64_t t = at.group < a.tokens ? at.group : 0;
  const GateRow<T, kUnits> row(static_cast<const T*>(a.logits) + t * a.stride,
                               at.group < a.tokens ? a.experts : 0, a.wide, at);
  gate_row(row, at, a.k, a.renormalize, a.weight + t * a.k, a.index + t * a.k);
}

inline int64_t gate_blocks(int64_t tokens, int lanes) {
  const int64_t each = kGateThreads / lanes;
  return (tokens + each - 1) / each;
}

template <class T>
void launch_gate(const GateArgs& a, cudaStream_t stream) {
  const int64_t blocks = gate_blocks(a.tokens, a.lanes);
  if (blocks == 0) return;
  with_units(a.experts, [&]<int kUnits>() {
    TENFOLD_LAUNCH((gate_kernel<T, kUnits>), static_cast<unsigned>(blocks), kGateThreads, stream,
                   a);
  });
}

struct GateGradArgs {
  const void* logits;
  int64_t tokens, stride, experts, k;
  bool renormalize, wide, wide_out;
  int lanes;
  const float *grad, *weight;
  IntArray index;     // outside of [0, n): nothing
  const float* also;  // [T, n], added; may be null
  void* out;          // [T, n]
};

template <class T>
GateGradArgs with_shape(GateGradArgs a) {
  a.lanes = gate_lanes(a.experts);
  a.wide = wide_rows<T, kGateUnit>(a.logits, a.stride, a.experts);
  a.wide_out = wide_rows<T, kGateUnit>(a.out, a.experts, a.experts) &&
               wide_rows<float, kGateUnit>(a.also, a.experts, a.experts);
  return a;
}

// What cancels is computed in double; k is small.
template <class T, int kUnits>
__global__ void __launch_bounds__(kGateThreads) gate_grad_kernel(GateGradArgs a) {
  const GateLane at(a.lanes);
  const bool exists = at.group < a.tokens;
  const int64_t t = exists ? at.group : 0;
  // Renormalized weights do not depend on the other logits.
  const GateRow<T, kUnits> row(static_cast<const T*>(a.logits) + t * a.stride,
                               exists && !a.renormalize ? a.experts : 0, a.wide, at);
  RowSoftmax softmax{};
  if (!a.renormalize) softmax = row_softmax(row, at);
  if (!exists) return;
  const float *const g = a.grad + t * a.k, *const w = a.weight + t * a.k;
  const double from = a.renormalize ? static_cast<double>(g[0]) : 0.0;
  double mean = 0.0;
  for (int64_t j = 0; j < a.k; ++j) mean += static_cast<double>(w[j]) * (g[j] - from);
  const auto others = static_cast<float>(-mean);
  const float* const also = a.also != nullptr ? a.also + t * a.experts : nullptr;
  T* const out = static_cast<T*>(a.out) + t * a.experts;
  const auto finish = [&](int64_t i, const float (&x)[kGateUnit]) {
    const int64_t left = a.experts - i;
    if (left <= 0) return;
    float y[kGateUnit];
#pragma unroll
    for (int q = 0; q < kGateUnit; ++q) y[q] = a.renormalize ? 0.0f : softmax(x[q]) * others;
    for (int64_t j = 0; j < a.k; ++j) {
      const int64_t at_q = a.index[t * a.k + j] - i;
      if (at_q < 0 || at_q >= kGateUnit) continue;
      const auto slope = static_cast<float>(static_cast<double>(w[j]) * ((g[j] - from) - mean));
#pragma unroll
      for (int q = 0; q < kGateUnit; ++q) y[q] = q == at_q ? slope : y[q];
    }
    if (also != nullptr) {
      float z[kGateUnit];
      load_some(also + i, left, a.wide_out, z);
#pragma unroll
      for (int q = 0; q < kGateUnit; ++q) y[q] += z[q];
    }
    store_some(y, out + i, left, a.wide_out);
  };
  if (a.renormalize) {
    const float none[kGateUnit] = {};
    for (int64_t i = row.first(0); i < a.experts; i += a.lanes * kGateUnit) finish(i, none);
  } else {
    row.each(finish);
  }
}

template <class T>
void launch_gate_grad(const GateGradArgs& a, cudaStream_t stream) {  // of with_shape
  const int64_t blocks = gate_blocks(a.tokens, a.lanes);
  if (blocks == 0) return;
  with_units(a.experts, [&]<int kUnits>() {
    TENFOLD_LAUNCH((gate_grad_kernel<T, kUnits>), static_cast<unsigned>(blocks), kGateThreads,
                   stream, a);
  });
}

}  // namespace tenfold::cuda
