// SPDX-License-Identifier: Apache-2.0
// Device code of router_seed_loss. A block has a layer's next kSeedChunk tokens: its warps multiply
// rows of h by r, a token each, and then its threads, some columns each, add the rows to the
// gradient of r, from the caches. Both leave a part per block; parts are added in a fixed order.
#pragma once

#include "moe/cuda/sum_parts.cuh"
#include "moe/router_losses.h"

namespace tenfold::cuda {

constexpr int kSeedThreads = 512, kSeedPer = 8, kSeedUnit = 4;

struct SeedArgs {
  const void *h, *r;  // [L, T, d] of the strides, [L, d]
  int64_t layers, tokens, dim, layer_stride, stride;
  bool h_wide, r_wide;
  const uint8_t* mask;  // [T] or null
  const float* target;  // [T] or null: 1
  Counted counted;
  int64_t chunks;  // of a layer
  float* slope;    // [L, T] or null
  double* losses;  // [L chunks]
  float* parts;    // [L, chunks, d] or null
};

template <class T, class R>
SeedArgs with_shape(SeedArgs a) {
  a.h_wide = wide_rows<T, kSeedPer>(a.h, a.stride, a.dim) &&
             wide_rows<T, kSeedPer>(a.h, a.layer_stride, a.dim);
  a.r_wide = wide_rows<R, kSeedPer>(a.r, a.dim, a.dim);
  a.chunks = (a.tokens + kSeedChunk - 1) / kSeedChunk;
  return a;
}

// h r of one token, in all lanes of a warp.
template <class T, class R>
__device__ inline float seed_dot(const SeedArgs& a, const T* h, const R* r) {
  float sum[2] = {};
#pragma unroll 2
  for (int64_t c = threadIdx.x % 32 * kSeedPer; c < a.dim; c += 32 * kSeedPer) {
    float x[kSeedPer], y[kSeedPer];
    load_some(h + c, a.dim - c, a.h_wide, x);
    load_some(r + c, a.dim - c, a.r_wide, y);
#pragma unroll
    for (int k = 0; k < kSeedPer; ++k) sum[k % 2] = fmaf(x[k], y[k], sum[k % 2]);
  }
  float z = sum[0] + sum[1];
  for (int step = 16; step > 0; step /= 2) z += __shfl_xor_sync(0xFFFFFFFFu, z, step);
  return z;
}

template <class T, class R>
__global__ void __launch_bounds__(kSeedThreads, 2) seed_kernel(SeedArgs a) {
  constexpr int kChunk = static_cast<int>(kSeedChunk);
  static_assert(kChunk == 32);  // a warp's votes
  TENFOLD_SHARED(float, slopes, kChunk);
  TENFOLD_SHARED(double, losses, kChunk);
  TENFOLD_SHARED(int, counting, kChunk);  // tokens of the chunk that count
  TENFOLD_SHARED(int, how_many, 1);
  const int64_t layer = blockIdx.x / a.chunks, first = blockIdx.x % a.chunks * kSeedChunk;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const T* const h = static_cast<const T*>(a.h) + layer * a.layer_stride + first * a.stride;
  const R* const r = static_cast<const R*>(a.r) + layer * a.dim;
  const auto counts = [&](int i) {
    return first + i < a.tokens && (a.mask == nullptr || a.mask[first + i] != 0);
  };
  const double scale = 1.0 / (static_cast<double>(a.layers) * a.counted.get());
  for (int i = warp; i < kChunk; i += kSeedThreads / 32) {
    SeedTerm term{};
    if (counts(i)) {
      const float z = seed_dot(a, h + i * a.stride, r);
      const double target = a.target != nullptr ? static_cast<double>(a.target[first + i]) : 1.0;
      if (lane == 0) {
        term = seed_term(z, target);
        term.slope *= scale;
      }
    }
    if (lane == 0) slopes[i] = static_cast<float>(term.slope), losses[i] = term.loss;
  }
  if (warp == 0) {
    const uint32_t bits = __ballot_sync(0xFFFFFFFFu, counts(lane));
    if (counts(lane)) counting[__popc(bits & ((1u << lane) - 1u))] = lane;
    if (lane == 0) *how_many = __popc(bits);
  }
  __syncthreads();
  if (warp == 0) {
    double loss = losses[lane];
    for (int step = 16; step > 0; step /= 2) loss += __shfl_xor_sync(0xFFFFFFFFu, loss, step);
    if (lane == 0) a.losses[blockIdx.x] = loss;
    if (a.slope != nullptr && first + lane < a.tokens)
      a.slope[layer * a.tokens + first + lane] = slopes[lane];
  }
  if (a.parts == nullptr) return;
  const int some = *how_many;
  float* const part = a.parts + static_cast<int64_t>(blockIdx.x) * a.dim;
  for (int64_t c = threadIdx.x * kSeedUnit; c < a.dim; c += kSeedThreads * kSeedUnit) {
    float sum[kSeedUnit] = {};
#pragma unroll 4
    for (int j = 0; j < some; ++j) {
      const int i = counting[j];
      const float slope = slopes[i];
      float x[kSeedUnit];
      load_some(h + i * a.stride + c, a.dim - c, a.h_wide, x);
#pragma unroll
      for (int k = 0; k < kSeedUnit; ++k) sum[k] = fmaf(slope, x[k], sum[k]);
    }
    store_some(sum, part + c, a.dim - c, a.dim % kSeedUnit == 0);
  }
}

inline int64_t seed_blocks(const SeedArgs& a) {
  return a.layers * a.chunks;
}

// loss: 0-d. grad_r [L, d] of R's dtype, where there are parts.
template <class T, class R>
void launch_seed(const SeedArgs& a, float* loss, void* grad_r, cudaStream_t stream) {
  const int64_t blocks = seed_blocks(a);
  if (blocks > 0)
    TENFOLD_LAUNCH((seed_kernel<T, R>), static_cast<unsigned>(blocks), kSeedThreads, stream, a);
  const double each = 1.0 / static_cast<double>(a.layers > 0 ? a.layers : 1);
  launch_finish_sum({a.losses, blocks, a.counted, each, false, loss}, stream);
  if (grad_r != nullptr)
    launch_sum_parts<R>(part_args(a.parts, a.layers, a.chunks, a.dim, grad_r), stream);
}

struct SeedGradArgs {
  const float *grad, *slope;  // 0-d, [L, T]
  const void* r;              // [L, d]
  int64_t layers, tokens, dim;
  bool r_wide, out_wide;
  void* out;  // [L, T, d]
};

template <class T, class R>
SeedGradArgs with_shape(SeedGradArgs a) {
  a.r_wide = wide_rows<R, kSeedPer>(a.r, a.dim, a.dim);
  a.out_wide = wide_rows<T, kSeedPer>(a.out, a.dim, a.dim);
  return a;
}

constexpr int kSeedGradThreads = 256;

// A warp a row.
template <class T, class R>
__global__ void __launch_bounds__(kSeedGradThreads) seed_grad_kernel(SeedGradArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kSeedGradThreads / 32) + threadIdx.x / 32;
  if (row >= a.layers * a.tokens) return;
  const float slope = a.slope[row], by = *a.grad * slope;
  const R* const r = static_cast<const R*>(a.r) + row / a.tokens * a.dim;
  T* const out = static_cast<T*>(a.out) + row * a.dim;
#pragma unroll 2
  for (int64_t c = threadIdx.x % 32 * kSeedPer; c < a.dim; c += 32 * kSeedPer) {
    float x[kSeedPer] = {};
    if (slope != 0.0f) {
      load_some(r + c, a.dim - c, a.r_wide, x);
#pragma unroll
      for (int k = 0; k < kSeedPer; ++k) x[k] *= by;
    }
    store_some(x, out + c, a.dim - c, a.out_wide);
  }
}

inline int64_t seed_grad_blocks(const SeedGradArgs& a) {
  constexpr int64_t kRows = kSeedGradThreads / 32;
  return (a.layers * a.tokens + kRows - 1) / kRows;
}

template <class T, class R>
void launch_seed_grad(const SeedGradArgs& a, cudaStream_t stream) {  // of with_shape
  const int64_t blocks = a.dim > 0 ? seed_grad_blocks(a) : 0;
  if (blocks > 0)
    TENFOLD_LAUNCH((seed_grad_kernel<T, R>), static_cast<unsigned>(blocks), kSeedGradThreads,
                   stream, a);
}

}  // namespace tenfold::cuda
