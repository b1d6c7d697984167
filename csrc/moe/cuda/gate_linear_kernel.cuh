// SPDX-License-Identifier: Apache-2.0
// Device code of moe_gate_linear. A block has kRouterGroups groups of kTok tokens; the warps of a
// group share the depth, lanes lie along it, where both operands are contiguous: sums of kTok
// tokens times kRouterExperts in each lane, so that a row of the router that has been read serves
// kTok tokens. The lanes' sums are added by halves, each lane keeping its own; then the block gates
// its tokens. The sum of a logit is cut up by the depth alone: a token gets the same bits in every
// batch.
#pragma once

#include "moe/cuda/gate_kernel.cuh"

namespace tenfold::cuda {

constexpr int kRouterThreads = 512, kRouterSplits = 4, kRouterPer = 8, kRouterExperts = 8;
constexpr int kRouterGroups = kRouterThreads / 32 / kRouterSplits;

struct RouterArgs {
  const void *x, *w;
  int64_t tokens, dim, experts;
  int64_t x_stride, w_stride;
  bool x_wide, w_wide;
  float* logits;  // [T, n]
  GateArgs gate;
};

template <class T, class W>
RouterArgs with_shape(RouterArgs a) {
  a.x_wide = wide_rows<T, kRouterPer>(a.x, a.x_stride, a.dim);
  a.w_wide = wide_rows<W, kRouterPer>(a.w, a.w_stride, a.dim);
  return a;
}

// Each lane keeps kV / 32 of the sums over all lanes (if there are fewer than 32, neighbours the
// same one); returns the number of its first. kV: a power of two.
template <int kV>
__device__ inline int add_over_lanes(float (&sums)[kV]) {
  const int lane = threadIdx.x % 32;
  int first = 0;
#pragma unroll
  for (int step = 16, count = kV; step > 0; step /= 2, count /= 2) {
    if (count < 2) {
      sums[0] += __shfl_xor_sync(0xFFFFFFFFu, sums[0], step);
      continue;
    }
    const bool upper = (lane & step) != 0;
    const int half = count / 2;
#pragma unroll
    for (int i = 0; i < kV / 2; ++i) {
      if (i >= half) break;
      const float kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, upper ? sums[i] : sums[i + half], step);
    }
    first += upper ? half : 0;
  }
  return first;
}

template <class T, class W, int kTok>
__global__ void __launch_bounds__(kRouterThreads, 1) router_kernel(RouterArgs a) {
  constexpr int kE = kRouterExperts, kPer = kRouterPer;
  constexpr int kV = kTok * kE, kKept = kV < 32 ? 1 : kV / 32, kAlike = kV < 32 ? 32 / kV : 1;
  constexpr int64_t kStep = 32 * kPer;
  TENFOLD_SHARED(float, shared, kRouterThreads / 32 * kV);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / kRouterSplits, split = warp % kRouterSplits;
  const int64_t block_token = static_cast<int64_t>(blockIdx.x) * kRouterGroups * kTok;
  const int64_t token = block_token + group * kTok;
  for (int64_t expert = 0; expert < a.experts; expert += kE) {
    float sums[kV] = {};
    // A warp without a token multiplies nothing.
    const int64_t end = token < a.tokens ? a.dim : 0;
    for (int64_t c = split * kStep + lane * kPer; c < end; c += kRouterSplits * kStep) {
      float x[kTok][kPer];
#pragma unroll
      for (int t = 0; t < kTok; ++t) {
        const int64_t at = token + t < a.tokens ? token + t : token;
        load_some(static_cast<const T*>(a.x) + at * a.x_stride + c, a.dim - c, a.x_wide, x[t]);
      }
#pragma unroll
      for (int e = 0; e < kE; ++e) {
        const int64_t at = expert + e < a.experts ? expert + e : a.experts - 1;
        float w[kPer];
        load_some(static_cast<const W*>(a.w) + at * a.w_stride + c, a.dim - c, a.w_wide, w);
#pragma unroll
        for (int t = 0; t < kTok; ++t)
#pragma unroll
          for (int k = 0; k < kPer; ++k) sums[t * kE + e] = fmaf(x[t][k], w[k], sums[t * kE + e]);
      }
    }
    const int first = add_over_lanes(sums);
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (lane % kAlike == 0) shared[warp * kV + first + i] = sums[i];
    __syncthreads();
    for (int i = threadIdx.x; i < kRouterGroups * kV; i += kRouterThreads) {
      const float* const of = shared + i / kV * kRouterSplits * kV + i % kV;
      float total = of[0];
#pragma unroll
      for (int s = 1; s < kRouterSplits; ++s) total += of[s * kV];
      const int64_t t = block_token + i / kE, e = expert + i % kE;
      if (t < a.tokens && e < a.experts) a.logits[t * a.experts + e] = total;
    }
    __syncthreads();
  }
  // There are lanes enough for all tokens of the block at once.
  static_assert(kRouterGroups * kTok <= kRouterThreads / 32);
  const GateLane at(a.gate.lanes);
  const int place = static_cast<int>(threadIdx.x) / a.gate.lanes;
  if (warp * 32 / a.gate.lanes >= kRouterGroups * kTok) return;
  const bool exists = place < kRouterGroups * kTok && block_token + place < a.tokens;
  const int64_t t = exists ? block_token + place : 0;
  const auto gate = [&]<int kUnits>() {
    const GateRow<float, kUnits> row(a.logits + t * a.experts, exists ? a.experts : 0, a.gate.wide,
                                     at);
    gate_row(row, at, a.gate.k, a.gate.renormalize, a.gate.weight + t * a.gate.k,
             a.gate.index + t * a.gate.k);
  };
  if (a.experts <= 32 * kGateUnit) return gate.template operator()<1>();
  if (a.experts <= 64 * kGateUnit) return gate.template operator()<2>();
  gate.template operator()<0>();
}

// Tokens of a group: one, where there are few.
inline int router_tokens(int64_t tokens) {
  return tokens <= 132 * kRouterGroups ? 1 : 4;
}

template <class T, class W>
void launch_router(const RouterArgs& a, cudaStream_t stream) {  // of with_shape
  const int some = router_tokens(a.tokens), each = some * kRouterGroups;
  const auto blocks = static_cast<unsigned>((a.tokens + each - 1) / each);
  if (blocks == 0) return;
  if (some == 1) {
    TENFOLD_LAUNCH((router_kernel<T, W, 1>), blocks, kRouterThreads, stream, a);
  } else {
    TENFOLD_LAUNCH((router_kernel<T, W, 4>), blocks, kRouterThreads, stream, a);
  }
}

}  // namespace tenfold::cuda
