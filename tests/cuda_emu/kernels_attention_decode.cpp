// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of dha_decode and dha_cache_append_, for ctypes. The
// launch code is the kernels' own.
#define TENFOLD_CUDA_EMU
#include "attention/cuda/dha_cache_append_kernel.cuh"
#include "attention/cuda/dha_decode_kernel.cuh"
#include "entry.h"  // after the kernels

namespace {

CacheStrides strides(const int64_t* at) {
  return {at[0], at[1], at[2]};
}

bool vectors(const void* data, const CacheStrides& at, int64_t dims, Dtype dtype) {
  const int64_t bits = (at.batch | at.token | at.head | dims) * dtype_size(dtype);
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(bits)) % 16 == 0;
}

}  // namespace

// n: dtype layout B H HK HV Sq D DV length block_size num_blocks table_width window splits
//    k_strides[3] v_strides[3] (batch, token, head); q contiguous
API void emu_dha_decode(const void* q, const void* k, const void* v, void* out, float* lse,
                        const void* const* index, const int64_t* wide, const int64_t* n,
                        float scale, float softcap) {
  DhaDecodeOnDevice p{};
  p.dtype = static_cast<Dtype>(n[0]), p.layout = static_cast<CacheLayout>(n[1]);
  p.batch = n[2], p.q_heads = n[3], p.k_heads = n[4], p.v_heads = n[5], p.num_queries = n[6];
  p.head_dim = n[7], p.value_dim = n[8], p.length = n[9], p.block_size = n[10];
  p.num_blocks = n[11], p.table_width = n[12], p.window_left = n[13], p.num_splits = n[14];
  p.k = strides(n + 15), p.v = strides(n + 18);
  p.q_batch = p.q_heads * p.num_queries * p.head_dim, p.q_head = p.num_queries * p.head_dim;
  p.q_query = p.head_dim, p.q_dim = 1;
  p.scale = scale, p.softcap = softcap;
  p.q_data = q, p.k_data = k, p.v_data = v, p.out = out, p.lse = lse;
  p.kmap = ints(index[0], wide[0]), p.vmap = ints(index[1], wide[1]);
  p.kv_lens = ints(index[2], wide[2]), p.kv_start = ints(index[3], wide[3]);
  p.offsets = ints(index[4], wide[4]), p.blocks = ints(index[5], wide[5]);
  p.k_vectors = vectors(k, p.k, p.head_dim, p.dtype);
  p.v_vectors = vectors(v, p.v, p.value_dim, p.dtype);
  with_dtype(n[0], [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim, [&]<int kW>() {
      std::vector<float> partial(plan_dha_decode<T, kW>(p), NAN);
      p.partial = partial.empty() ? nullptr : partial.data();
      launch_dha_decode<T, kW>(p, nullptr);
    });
  });
}

// n: dtype layout angle_dtype B HK HV S D DV num_slots block_size rotate slots_wide cos_batch
//    sin_batch k_cache[3] v_cache[3]; k, v, slots and angles contiguous
API void emu_dha_append(void* k_to, void* v_to, const void* k, const void* v, const void* slots,
                        const void* cos, const void* sin, const int64_t* n) {
  DhaAppendOnDevice p{};
  p.dtype = static_cast<Dtype>(n[0]), p.layout = static_cast<CacheLayout>(n[1]);
  p.angle_dtype = static_cast<Dtype>(n[2]);
  p.batch = n[3], p.k_heads = n[4], p.v_heads = n[5], p.num_tokens = n[6];
  p.head_dim = n[7], p.value_dim = n[8], p.num_slots = n[9], p.block_size = n[10];
  p.rotate = n[11] != 0, p.slots_wide = n[12] != 0;
  p.cos_batch = n[13], p.sin_batch = n[14], p.cos_token = p.sin_token = p.head_dim;
  p.k_cache = strides(n + 15), p.v_cache = strides(n + 18);
  p.k_token = p.head_dim, p.k_head = p.num_tokens * p.k_token, p.k_batch = p.k_heads * p.k_head;
  p.v_token = p.value_dim, p.v_head = p.num_tokens * p.v_token, p.v_batch = p.v_heads * p.v_head;
  p.slot_token = 1, p.slot_batch = p.num_tokens;
  p.k_data = k, p.v_data = v, p.k_to = k_to, p.v_to = v_to, p.slots = slots;
  p.cos = cos, p.sin = sin;
  p.vectors = append_vectors(p);
  with_dtype(n[0], [&]<class T>() { launch_dha_append<T>(p, nullptr); });
}
