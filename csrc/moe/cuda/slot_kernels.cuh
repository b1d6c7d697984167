// SPDX-License-Identifier: Apache-2.0
// Slots and tokens of expert blocks: the token and the weight of every position, sums over a
// token's slots in their order, and the gradient of routing weights. No atomics: an element has one
// owner.
#pragma once

#include "core/vectors.cuh"

namespace tenfold::cuda {

struct SlotTokensArgs {
  const int* order;     // of sorted slots; -1: nobody's
  const float* weight;  // of slots
  int64_t slots, k;
  int* token;  // at a position, if it is somebody's; so is factor, its weight
  float* factor;
};

constexpr int kSlotThreads = 128;

inline unsigned slot_blocks(int64_t slots) {
  return static_cast<unsigned>((slots + kSlotThreads - 1) / kSlotThreads);
}

static __global__ void __launch_bounds__(kSlotThreads) slot_tokens_kernel(SlotTokensArgs a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSlotThreads + threadIdx.x;
  const int slot = at < a.slots ? a.order[at] : -1;
  if (slot < 0) return;
  a.token[at] = slot / static_cast<int>(a.k);
  a.factor[at] = a.weight[slot];
}

inline void launch_slot_tokens(const SlotTokensArgs& a, cudaStream_t stream) {
  if (a.slots > 0)
    TENFOLD_LAUNCH(slot_tokens_kernel, slot_blocks(a.slots), kSlotThreads, stream, a);
}

// out[t] = base[t] + the sum over j of in[inverse[t k + j]], in this order, -1 left out.
struct SumSlotsArgs {
  const int* inverse;
  int64_t tokens, k, cols;
  const void* in;
  int64_t in_stride;
  const float* base;  // or null
  int64_t base_stride;
  void* out;
  int64_t out_stride;
  unsigned strips;
  bool in_wide, base_wide, out_wide;
};

constexpr int kSumThreads = 128, kSumEach = 4, kSumStrip = kSumThreads * kSumEach;

// A block: a strip of a token's columns.
template <class In, class T>
__global__ void __launch_bounds__(kSumThreads) sum_slots_kernel(SumSlotsArgs a) {
  const int64_t token = blockIdx.x / a.strips;
  const int64_t c = blockIdx.x % a.strips * int64_t{kSumStrip} + threadIdx.x * kSumEach;
  const int64_t left = a.cols - c;
  if (left <= 0) return;
  const int* const at = a.inverse + token * a.k;
  float sum[kSumEach] = {}, x[kSumEach];
  if (a.base != nullptr) load_some(a.base + token * a.base_stride + c, left, a.base_wide, sum);
  for (int64_t j = 0; j < a.k; ++j) {
    const int64_t row = at[j];
    if (row < 0) continue;
    load_some(static_cast<const In*>(a.in) + row * a.in_stride + c, left, a.in_wide, x);
#pragma unroll
    for (int i = 0; i < kSumEach; ++i) sum[i] += x[i];
  }
  store_some(sum, static_cast<T*>(a.out) + token * a.out_stride + c, left, a.out_wide);
}

template <class In, class T>
void launch_sum_slots(SumSlotsArgs a, cudaStream_t stream) {
  if (a.tokens == 0 || a.cols == 0) return;
  a.strips = static_cast<unsigned>((a.cols + kSumStrip - 1) / kSumStrip);
  a.in_wide = wide_rows<In, kSumEach>(a.in, a.in_stride, kSumEach);
  a.base_wide = wide_rows<float, kSumEach>(a.base, a.base_stride, kSumEach);
  a.out_wide = wide_rows<T, kSumEach>(a.out, a.out_stride, kSumEach);
  const auto kernel = sum_slots_kernel<In, T>;
  TENFOLD_LAUNCH(kernel, static_cast<unsigned>(a.tokens * a.strips), kSumThreads, stream, a);
}

// out[slot] (+)= the parts of its position, one after another; 0 for a slot of nobody.
struct SlotDotsArgs {
  const int* inverse;
  int64_t slots, parts;
  const float* dots;  // [parts][slots]
  bool add;
  float* out;
};

static __global__ void __launch_bounds__(kSlotThreads) slot_dots_kernel(SlotDotsArgs a) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kSlotThreads + threadIdx.x;
  if (slot >= a.slots) return;
  const int64_t at = a.inverse[slot];
  float sum = a.add ? a.out[slot] : 0.0f;
  if (at >= 0)
    for (int64_t i = 0; i < a.parts; ++i) sum += a.dots[i * a.slots + at];
  a.out[slot] = sum;
}

inline void launch_slot_dots(const SlotDotsArgs& a, cudaStream_t stream) {
  if (a.slots > 0) TENFOLD_LAUNCH(slot_dots_kernel, slot_blocks(a.slots), kSlotThreads, stream, a);
}

}  // namespace tenfold::cuda
