// SPDX-License-Identifier: Apache-2.0
// Device code of dare_merge, and of all merges without a cut: a thread has the 16 elements that one
// Philox call of each expert decides about, reads them from every input and writes them once. The
// weights may be on the device, where norms have changed them.
#pragma once

#include "merge/cuda/mix.cuh"

namespace tenfold::cuda {

constexpr int kMergeThreads = 256;

struct DeltaRun {
  DeltaMerge m;
  int64_t n;
  int shift;  // elements by which the first block of draws begins before the first element
  bool wide;
  const float* weight;  // [experts]; null: those of m
};

inline DeltaRun delta_run(const DeltaMerge& m, int64_t n, const float* weight) {
  const int shift = m.pick == Pick::random ? static_cast<int>(m.offset % kDrawn) : 0;
  const bool wide =
      all_aligned(m.expert, m.experts, m.base, m.out) && shift * dtype_size(m.dtype) % 16 == 0;
  return {m, n, shift, wide, weight};
}

// Runs of elements, each of which is a block's at a time.
TENFOLD_HD int64_t delta_runs(const DeltaRun& a) {
  constexpr int64_t kEach = kMergeThreads * kDrawn;
  return a.n > 0 ? (a.n + a.shift + kEach - 1) / kEach : 0;
}

// First of the elements of this thread.
__device__ inline int64_t drawn_first(int64_t run, int shift) {
  return (run * kMergeThreads + threadIdx.x) * kDrawn - shift;
}

template <class T, bool kRandom, Mix kMix>
__global__ void __launch_bounds__(kMergeThreads, kMix == Mix::plain ? 3 : 2)
    delta_merge_kernel(DeltaRun a) {
  // Of means there are four sums an element: one half after the other, with the draws made twice.
  constexpr int kEach = kMix == Mix::elected_mean ? kDrawn / 2 : kDrawn;
  const int64_t first = drawn_first(blockIdx.x, a.shift);
  if (first >= a.n) return;
#pragma unroll 1
  for (int done = 0; done < kDrawn; done += kEach) {
    const int64_t i = first + done;
    float base[kEach];
    load_run<T>(a.m.base, i, a.n, a.wide, base);
    MixSums<kMix> sums[kEach];
    for (int e = 0; e < a.m.experts; ++e) {
      float x[kEach];
      load_run<T>(a.m.expert[e], i, a.n, a.wide, x);
      uint32_t kept = 0xFFFFu;
      if constexpr (kRandom)
        kept = kept_bits(a.m.key, static_cast<uint64_t>(a.m.offset + first) / kDrawn, a.m.number[e],
                         a.m.drop[e]);
      const float weight = a.weight != nullptr ? a.weight[e] : a.m.weight[e], share = a.m.share[e];
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        sums[k].add(!kRandom || (kept >> (done + k) & 1u) != 0, subtract(x[k], base[k]), weight,
                    share);
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) base[k] = sums[k].result(base[k], a.m.lambda);
    store_run<T>(base, a.m.out, i, a.n, a.wide);
  }
}

template <class T>
void launch_delta_merge(const DeltaRun& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(delta_runs(a));
  if (blocks == 0) return;
  with_mix(a.m, [&]<Mix kMix>() {
    if (a.m.pick == Pick::random) {
      TENFOLD_LAUNCH((delta_merge_kernel<T, true, kMix>), blocks, kMergeThreads, stream, a);
    } else {
      TENFOLD_LAUNCH((delta_merge_kernel<T, false, kMix>), blocks, kMergeThreads, stream, a);
    }
  });
}

constexpr int kSummed = 8;  // elements of a thread of a weighted sum

struct WeightedSumArgs {
  WeightedSum m;
  int64_t n;
  bool wide;
  const float* weight;  // [terms]; null: those of m
};

inline WeightedSumArgs weighted_sum_args(const WeightedSum& m, int64_t n, const float* weight) {
  return {m, n, all_aligned(m.term, m.terms, m.out), weight};
}

inline int64_t weighted_sum_blocks(const WeightedSumArgs& a) {
  constexpr int64_t kEach = kMergeThreads * kSummed;
  return (a.n + kEach - 1) / kEach;
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads) weighted_sum_kernel(WeightedSumArgs a) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x) * kSummed;
  if (i >= a.n) return;
  float sum[kSummed];
#pragma unroll
  for (int k = 0; k < kSummed; ++k) sum[k] = -0.0f;
#pragma unroll 4
  for (int e = 0; e < a.m.terms; ++e) {
    float x[kSummed];
    load_run<T>(a.m.term[e], i, a.n, a.wide, x);
    const float weight = a.weight != nullptr ? a.weight[e] : a.m.weight[e];
#pragma unroll
    for (int k = 0; k < kSummed; ++k) sum[k] = fmaf(weight, x[k], sum[k]);
  }
  store_run<T>(sum, a.m.out, i, a.n, a.wide);
}

template <class T>
void launch_weighted_sum(const WeightedSumArgs& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(weighted_sum_blocks(a));
  if (blocks > 0) TENFOLD_LAUNCH(weighted_sum_kernel<T>, blocks, kMergeThreads, stream, a);
}

}  // namespace tenfold::cuda
