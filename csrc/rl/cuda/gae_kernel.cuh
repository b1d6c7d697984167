// SPDX-License-Identifier: Apache-2.0
// Device code of macro_gae and gae: a reverse affine scan A_t = delta_t + (g lam) A_{t+1} by a
// block per row.
#pragma once

#include "rl/cuda/row_scan.cuh"
#include "rl/returns.h"

namespace tenfold::cuda {

// Shared memory of one row's scan.
struct GaeMemory {
  int32_t* marks;  // MarkScan::kInts
  double* affine;  // AffineScan::kDoubles
};

// Over the valid ones of n steps, from the last: steps.valid(t), value(t), reward(t), discount(t),
// and store(t, valid, advantage, return), which may overwrite what the others read of this step.
template <class Steps>
__device__ inline void gae_steps(int64_t n, double lam, double bootstrap, const Steps& steps,
                                 const GaeMemory& memory) {
  MarkScan marks{memory.marks};  // places are counted from the end
  AffineScan affine{memory.affine};
  double edge = 0.0;  // value of the last valid step of the tiles before
  for (int64_t tile = 0; tile < n; tile += kRowThreads) {
    const int64_t i = tile + threadIdx.x, t = n - 1 - i;
    const bool valid = i < n && steps.valid(t);
    int32_t rank, later;
    marks.step(valid, static_cast<int32_t>(tile), &rank, &later);
    double c = 1.0, d = 0.0, value = 0.0;
    if (valid) {
      value = steps.value(t);
      const double next = later < 0 ? bootstrap : later >= tile ? steps.value(n - 1 - later) : edge;
      const double g = steps.discount(t);
      c = g * lam, d = steps.reward(t) + g * next - value;
    }
    if (marks.last >= tile) edge = steps.value(n - 1 - marks.last);
    double before;
    const double adv = affine.step(c, d, &before);  // its barrier: all has been read
    if (i < n) steps.store(t, valid, adv, adv + value);
  }
}

struct GaeRow {
  const GaeParams<float>& p;
  int64_t begin;

  __device__ inline bool valid(int64_t t) const { return !p.masked || p.mask[begin + t] != 0; }
  __device__ inline double value(int64_t t) const { return p.value[begin + t]; }
  __device__ inline double reward(int64_t t) const { return p.reward[begin + t]; }
  __device__ inline double discount(int64_t t) const {
    return p.length == nullptr ? p.rule.gamma
                               : pow(p.rule.gamma, static_cast<double>(p.length[begin + t]));
  }
  __device__ inline void store(int64_t t, bool valid, double adv, double ret) const {
    p.adv[begin + t] = valid ? static_cast<float>(adv) : 0.0f;
    p.ret[begin + t] = valid ? static_cast<float>(ret) : 0.0f;
  }
};

__global__ void __launch_bounds__(kRowThreads) gae_kernel(GaeParams<float> p) {
  TENFOLD_SHARED(int32_t, marks, MarkScan::kInts);
  TENFOLD_SHARED(double, affine, AffineScan::kDoubles);
  const int64_t b = blockIdx.x;
  const Span span = p.rows[b];
  const int64_t n = p.masked ? span.width : count_at(p.nseg, b, span.width);
  const double bootstrap = p.bootstrap != nullptr ? static_cast<double>(p.bootstrap[b]) : 0.0;
  const GaeRow row{p, span.begin};
  gae_steps(n, p.rule.lam, bootstrap, row, {marks, affine});
  for (int64_t t = n + threadIdx.x; t < span.width; t += kRowThreads) row.store(t, false, 0, 0);
}

inline void launch_gae(const GaeParams<float>& p, cudaStream_t stream) {
  if (p.rows.count > 0)
    TENFOLD_LAUNCH(gae_kernel, static_cast<unsigned>(p.rows.count), kRowThreads, stream, p);
}

}  // namespace tenfold::cuda
