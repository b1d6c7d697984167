// SPDX-License-Identifier: Apache-2.0
// Device code of rescale="l1" and "l2" of dare_merge: the weight of each expert times what dropping
// took from the norm of its task vector, on the device.
#pragma once

#include "merge/cuda/delta_merge_kernel.cuh"
#include "merge/cuda/parts.cuh"

namespace tenfold::cuda {

struct NormsArgs {
  DeltaRun merge;
  bool squared;
  int64_t blocks;
  double* parts;  // [blocks][experts][2]: all, and those kept
  float* weight;  // [experts]
};

inline NormsArgs norms_args(const DeltaRun& merge, bool squared) {
  return {merge, squared, part_blocks(merge.n + merge.shift, kMergeThreads * kDrawn), nullptr,
          nullptr};
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads) norms_kernel(NormsArgs a) {
  constexpr int kWarps = kMergeThreads / 32;
  TENFOLD_SHARED(double, sums, 2 * kWarps);
  const DeltaMerge& m = a.merge.m;
  const int64_t n = a.merge.n, runs = delta_runs(a.merge);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int e = 0; e < m.experts; ++e) {
    double all = 0.0, kept = 0.0;
    for (int64_t run = blockIdx.x; run < runs; run += a.blocks) {
      const int64_t i = drawn_first(run, a.merge.shift);
      if (i >= n) continue;
      float base[kDrawn], x[kDrawn];
      load_run<T>(m.base, i, n, a.merge.wide, base);
      load_run<T>(m.expert[e], i, n, a.merge.wide, x);
      const uint32_t bits =
          kept_bits(m.key, static_cast<uint64_t>(m.offset + i) / kDrawn, m.number[e], m.drop[e]);
#pragma unroll
      for (int k = 0; k < kDrawn; ++k) {
        const double d = fabsf(subtract(x[k], base[k])), y = a.squared ? d * d : d;
        all += y;
        kept += (bits >> k & 1u) != 0 ? y : 0.0;
      }
    }
    all = warp_total(all), kept = warp_total(kept);
    if (threadIdx.x % 32 == 0) sums[2 * warp] = all, sums[2 * warp + 1] = kept;
    __syncthreads();
    if (threadIdx.x < 2) {
      double total = 0.0;
      for (int w = 0; w < kWarps; ++w) total += sums[2 * w + threadIdx.x];
      a.parts[(blockIdx.x * static_cast<int64_t>(m.experts) + e) * 2 + threadIdx.x] = total;
    }
    __syncthreads();
  }
}

constexpr int kFactorThreads = 1024;

// A warp an expert.
static __global__ void __launch_bounds__(kFactorThreads) norm_factors_kernel(NormsArgs a) {
  const int experts = a.merge.m.experts;
  for (int e = static_cast<int>(threadIdx.x) / 32; e < experts; e += kFactorThreads / 32) {
    const double all = sum_of_parts(a.parts + 2 * e, a.blocks, 2 * experts);
    const double kept = sum_of_parts(a.parts + 2 * e + 1, a.blocks, 2 * experts);
    double factor = kept > 0.0 ? all / kept : 1.0;
    if (a.squared) factor = sqrt(factor);
    if (threadIdx.x % 32 == 0) a.weight[e] = static_cast<float>(a.merge.m.weight[e] * factor);
  }
}

template <class T>
void launch_norms(const NormsArgs& a, cudaStream_t stream) {
  if (a.blocks > 0)
    TENFOLD_LAUNCH(norms_kernel<T>, static_cast<unsigned>(a.blocks), kMergeThreads, stream, a);
  TENFOLD_LAUNCH(norm_factors_kernel, 1, kFactorThreads, stream, a);
}

}  // namespace tenfold::cuda
