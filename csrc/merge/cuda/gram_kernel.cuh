// SPDX-License-Identifier: Apache-2.0
// Device code of delta_gram, and of slerp_merge's angle: differences, products and sums in float64.
// A thread holds the sums of a group of pairs of experts in registers, all those of up to 8 experts
// in one pass; more are cut into groups of 8, and pairs of groups into launches of their own.
#pragma once

#include "core/vectors.cuh"
#include "merge/cuda/mix.cuh"
#include "merge/cuda/parts.cuh"
#include "merge/delta_gram.h"
#include "merge/slerp.h"

namespace tenfold::cuda {

constexpr int kGramThreads = 256;

struct GramArgs {
  GramInput in;
  int64_t n;
  bool wide;
  int64_t blocks;
  double* parts;  // [blocks][experts][experts], upper triangles
};

inline GramArgs gram_args(const GramInput& in, int64_t n) {
  const int64_t each = kGramThreads * (16 / dtype_size(in.dtype));
  return {in, n, all_aligned(in.expert, in.experts, in.base), part_blocks(n, each), nullptr};
}

inline int64_t gram_doubles(const GramArgs& a) {  // of `parts`
  return a.blocks * a.in.experts * a.in.experts;
}

// Experts row .. row + kRows - 1 with col .. col + kCols - 1; kCols = 0: with each other.
template <class T, int kRows, int kCols>
__global__ void __launch_bounds__(kGramThreads, 1) gram_kernel(GramArgs a, int row, int col) {
  // Elements at a time: of 12 inputs of 16 bytes there would be more than registers hold.
  constexpr int kPer = kCols == 0 ? kPerVector<T> : 4, kWarps = kGramThreads / 32;
  constexpr int kPairs = kCols == 0 ? kRows * (kRows + 1) / 2 : kRows * kCols;
  TENFOLD_SHARED(double, shared, kWarps* kPairs);
  const int experts = a.in.experts;
  double sums[kPairs] = {};
  const int64_t step = a.blocks * kGramThreads * kPer;
#pragma unroll 1
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kGramThreads + threadIdx.x) * kPer; i < a.n;
       i += step) {
    float base[kPer] = {}, x[kRows + kCols][kPer];
    if (a.in.base != nullptr) load_run<T>(a.in.base, i, a.n, a.wide, base);
#pragma unroll
    for (int r = 0; r < kRows + kCols; ++r) {
      const int e = r < kRows ? row + r : col + r - kRows;
      // One that is not there has no difference from the base.
      if (e < experts) {
        load_run<T>(a.in.expert[e], i, a.n, a.wide, x[r]);
      } else {
#pragma unroll
        for (int k = 0; k < kPer; ++k) x[r][k] = base[k];
      }
    }
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      double d[kRows + kCols];
#pragma unroll
      for (int r = 0; r < kRows + kCols; ++r)
        d[r] = static_cast<double>(x[r][k]) - static_cast<double>(base[k]);
      int pair = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = kCols == 0 ? r : kRows; c < kRows + kCols; ++c, ++pair)
          sums[pair] = fma(d[r], d[c], sums[pair]);
    }
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const double total = warp_total(sums[p]);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * kPairs + p] = total;
  }
  __syncthreads();
  double* const part = a.parts + blockIdx.x * static_cast<int64_t>(experts) * experts;
  for (int p = threadIdx.x; p < kPairs; p += kGramThreads) {
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += shared[w * kPairs + p];
    int r = 0, c = p;
    if constexpr (kCols == 0) {
      while (c >= kRows - r) c -= kRows - r++;
      c += r;
    } else {
      r = p / kCols, c = p % kCols;
    }
    const int j = row + r, k = col + c;
    if (j < experts && k < experts) part[j * experts + k] = total;
  }
}

template <class T>
void launch_gram_parts(const GramArgs& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(a.blocks);
  if (blocks == 0) return;
  const int m = a.in.experts;
  if (m <= 2) {
    TENFOLD_LAUNCH((gram_kernel<T, 2, 0>), blocks, kGramThreads, stream, a, 0, 0);
    return;
  }
  if (m <= 4) {
    TENFOLD_LAUNCH((gram_kernel<T, 4, 0>), blocks, kGramThreads, stream, a, 0, 0);
    return;
  }
  for (int row = 0; row < m; row += 8) {
    TENFOLD_LAUNCH((gram_kernel<T, 8, 0>), blocks, kGramThreads, stream, a, row, row);
    for (int col = row + 8; col < m; col += 8)
      for (int half = row; half < row + 8; half += 4)
        TENFOLD_LAUNCH((gram_kernel<T, 4, 8>), blocks, kGramThreads, stream, a, half, col);
  }
}

constexpr int kGramSumThreads = 1024;

// Adds the parts to gram, a warp a pair; `fresh`: gram holds nothing yet.
static __global__ void __launch_bounds__(kGramSumThreads)
    gram_sum_kernel(const double* parts, int64_t blocks, int experts, bool fresh, double* gram) {
  const int pairs = experts * experts;
  const int warps = static_cast<int>(gridDim.x) * (kGramSumThreads / 32);
  for (int p = static_cast<int>(blockIdx.x) * (kGramSumThreads / 32) +
               static_cast<int>(threadIdx.x) / 32;
       p < pairs; p += warps) {
    const int j = p / experts, k = p % experts;
    if (k < j) continue;
    const double sum = sum_of_parts(parts + p, blocks, pairs);
    if (threadIdx.x % 32 != 0) continue;
    const int mirrored = k * experts + j;
    gram[p] = fresh ? sum : gram[p] + sum;
    if (mirrored != p) gram[mirrored] = fresh ? sum : gram[mirrored] + sum;
  }
}

template <class T>
void launch_gram(const GramArgs& a, bool fresh, double* gram, cudaStream_t stream) {
  launch_gram_parts<T>(a, stream);
  const int m = a.in.experts;
  const auto blocks = static_cast<unsigned>((m * m + 31) / 32);
  TENFOLD_LAUNCH(gram_sum_kernel, blocks, kGramSumThreads, stream, a.parts, a.blocks, m, fresh,
                 gram);
}

// One thread.
static __global__ void __launch_bounds__(32)
    slerp_weights_kernel(SlerpRule rule, const double* gram, float* weight) {
  const SlerpWeights w = rule.weights(gram[0], gram[1], gram[3]);
  weight[0] = static_cast<float>(w.first);
  weight[1] = static_cast<float>(w.second);
}

inline void launch_slerp_weights(const SlerpRule& rule, const double* gram, float* weight,
                                 cudaStream_t stream) {
  TENFOLD_LAUNCH(slerp_weights_kernel, 1, 32, stream, rule, gram, weight);
}

}  // namespace tenfold::cuda
