// SPDX-License-Identifier: Apache-2.0
// Device code of dha_cache_append_: one warp per (token, key or value head) moves one row, keys
// with their rotation.
#pragma once

#include "attention/cuda/decode_launch.h"

namespace tenfold::cuda {

constexpr int kAppendThreads = 128, kAppendWarps = kAppendThreads / 32;

__device__ inline float angle_at(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[at];
  if (dtype == Dtype::bf16) return to_float(static_cast<const bf16_t*>(data)[at]);
  return to_float(static_cast<const fp16_t*>(data)[at]);
}

// Element before the row of a slot and head in a cache.
TENFOLD_HD int64_t cache_row(const DhaAppendParams& p, const CacheStrides& at, int64_t b,
                             int64_t slot, int64_t head) {
  if (p.layout == CacheLayout::paged)
    return slot / p.block_size * at.batch + slot % p.block_size * at.token + head * at.head;
  return b * at.batch + slot * at.token + head * at.head;
}

// Both halves are read before either is written: a lane owns a pair.
template <class T>
__device__ inline void rotate_into(const DhaAppendOnDevice& p, const T* from, T* to, int64_t b,
                                   int64_t s) {
  const int64_t half = p.head_dim / 2;
  const int64_t cos0 = b * p.cos_batch + s * p.cos_token, sin0 = b * p.sin_batch + s * p.sin_token;
  const auto cos = [&](int64_t i) { return angle_at(p.cos, p.angle_dtype, cos0 + i); };
  const auto sin = [&](int64_t i) { return angle_at(p.sin, p.angle_dtype, sin0 + i); };
  for (int64_t i = threadIdx.x % 32; i < half; i += 32) {
    const float x1 = to_float(from[i]), x2 = to_float(from[half + i]);
    from_float(fmaf(x1, cos(i), -(x2 * sin(i))), to + i);
    from_float(fmaf(x2, cos(half + i), x1 * sin(half + i)), to + half + i);
  }
}

template <class T>
__global__ void __launch_bounds__(kAppendThreads) dha_append_kernel(DhaAppendOnDevice p) {
  const int64_t heads = p.k_heads + p.v_heads;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
  if (i >= p.batch * p.num_tokens * heads) return;
  const int64_t token = i / heads, b = token / p.num_tokens, s = token % p.num_tokens;
  const int64_t slot_at = b * p.slot_batch + s * p.slot_token;
  const int64_t slot = p.slots_wide ? static_cast<const int64_t*>(p.slots)[slot_at]
                                    : static_cast<const int32_t*>(p.slots)[slot_at];
  if (slot < 0 || slot >= p.num_slots) return;
  const bool is_key = i % heads < p.k_heads;
  const int64_t h = is_key ? i % heads : i % heads - p.k_heads;
  const T* const from =
      is_key ? static_cast<const T*>(p.k_data) + b * p.k_batch + h * p.k_head + s * p.k_token
             : static_cast<const T*>(p.v_data) + b * p.v_batch + h * p.v_head + s * p.v_token;
  T* const to = is_key ? static_cast<T*>(p.k_to) + cache_row(p, p.k_cache, b, slot, h)
                       : static_cast<T*>(p.v_to) + cache_row(p, p.v_cache, b, slot, h);
  if (is_key && p.rotate) return rotate_into(p, from, to, b, s);
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  const int64_t dims = is_key ? p.head_dim : p.value_dim;
  if (p.vectors) {
    for (int64_t d = threadIdx.x % 32; d < dims / kPer; d += 32)
      reinterpret_cast<uint4*>(to)[d] = reinterpret_cast<const uint4*>(from)[d];
  } else {
    for (int64_t d = threadIdx.x % 32; d < dims; d += 32) to[d] = from[d];
  }
}

inline int64_t append_blocks(const DhaAppendOnDevice& p) {
  const int64_t rows = p.batch * p.num_tokens * (p.k_heads + p.v_heads);
  return (rows + kAppendWarps - 1) / kAppendWarps;
}

// Whether every row of every tensor is whole, aligned 16-byte vectors.
inline bool append_vectors(const DhaAppendOnDevice& p) {
  int64_t bits = p.head_dim | p.value_dim | p.k_batch | p.k_head | p.k_token | p.v_batch |
                 p.v_head | p.v_token;
  for (const CacheStrides& at : {p.k_cache, p.v_cache}) bits |= at.batch | at.token | at.head;
  auto all = static_cast<uintptr_t>(bits * dtype_size(p.dtype));
  for (const void* data :
       {p.k_data, p.v_data, static_cast<const void*>(p.k_to), static_cast<const void*>(p.v_to)})
    all |= reinterpret_cast<uintptr_t>(data);
  return all % 16 == 0;
}

template <class T>
void launch_dha_append(const DhaAppendOnDevice& p, cudaStream_t stream) {
  const int64_t blocks = append_blocks(p);
  if (blocks == 0) return;
  TENFOLD_LAUNCH(dha_append_kernel<T>, static_cast<unsigned>(blocks), kAppendThreads, stream, p);
}

}  // namespace tenfold::cuda
