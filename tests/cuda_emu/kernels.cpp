// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels, for ctypes. The launch code is the kernels' own.
#define TENFOLD_CUDA_EMU
#include "_template/cuda/template_scale_kernel.cuh"
#include "entry.h"  // after the kernels
#include "kv_eviction/cuda/kv_gather_kernel.cuh"
#include "kv_eviction/cuda/nacl_select_kernel.cuh"
#include "kv_eviction/cuda/proxy_scores_kernel.cuh"
#include "kv_eviction/cuda/ragged_decode_kernel.cuh"

API void emu_template_scale(const void* x, void* y, int64_t n, float scale, int64_t dtype) {
  with_dtype(dtype, [&]<class T>() {
    launch_template_scale(static_cast<const T*>(x), static_cast<T*>(y), n, scale, nullptr);
  });
}

// n: dtype B Hq Hkv W L D q_strides[3] k_strides[3] q_offset causal window reduce per_row has_lse
API void emu_proxy_scores(const void* q, const void* k, float* lse, float* scores,
                          const void* const* index, const int64_t* wide, const int64_t* n,
                          float scale) {
  ProxyArgs p{};
  p.q = q, p.k = k, p.lse = p.lse_out = lse, p.scores = scores;
  p.batch = n[1], p.q_heads = n[2], p.kv_heads = n[3], p.num_proxies = n[4], p.length = n[5];
  p.head_dim = n[6];
  for (int i = 0; i < 3; ++i) p.q_stride[i] = n[7 + i], p.k_stride[i] = n[10 + i];
  p.q_offset = n[13], p.causal = n[14] != 0, p.window = n[15];
  p.reduce = static_cast<ScoreReduce>(n[16]);
  p.positions_per_row = n[17] != 0;
  p.positions = ints(index[0], wide[0]);
  p.kv_start = ints(index[1], wide[1]);
  p.kv_lens = ints(index[2], wide[2]);
  p.kmap = ints(index[3], wide[3]);
  p.scale = scale;
  choose_vectors(p, n[0] == 0 ? 4 : 2);
  choose_splits(p);
  std::vector<float> partial(p.splits * p.batch * p.q_heads * p.num_proxies * 2);
  p.partial = partial.data();
  with_dtype(n[0], [&]<class T>() { launch_proxy_scores<T>(p, n[18] != 0, nullptr); });
}

// n: B H L sink recent topk random layer pool_kernel pool_max per_head log_score seed
API void emu_nacl_select(const float* scores, int64_t* idx, int32_t* new_lens,
                         const void* const* index, const int64_t* wide, const int64_t* n,
                         float tau) {
  SelectArgs a{};
  a.p.batch = n[0], a.p.heads = n[1], a.p.length = n[2];
  a.p.counts = {static_cast<int32_t>(n[3]), static_cast<int32_t>(n[4]), static_cast<int32_t>(n[5]),
                static_cast<int32_t>(n[6])};
  a.p.width = n[3] + n[4] + n[5] + n[6];
  a.p.layer = static_cast<uint32_t>(n[7]);
  a.p.pool_kernel = static_cast<int32_t>(n[8]);
  a.p.pool_max = n[9] != 0;
  a.p.counts_per_head = n[10] != 0;
  a.p.log_score = n[11] != 0;
  a.p.seed_lo = static_cast<uint32_t>(n[12]);
  a.p.seed_hi = static_cast<uint32_t>(static_cast<uint64_t>(n[12]) >> 32);
  a.p.tau = tau;
  a.scores = scores, a.idx = idx, a.new_lens = new_lens;
  a.kv_start = ints(index[0], wide[0]);
  a.kv_lens = ints(index[1], wide[1]);
  a.row_id = ints(index[2], wide[2]);
  a.counts = ints(index[3], wide[3]);
  std::vector<uint32_t> keys(n[0] * n[1] * n[2] + 1);
  a.keys = keys.data();
  launch_nacl_select(a, nullptr);
}

// n: dtype B HK HV L D DV C Hi per_head compact; k, v contiguous
API void emu_kv_move(void* k, void* v, void* k_to, void* v_to, const float* inv_freq,
                     const void* const* index, const int64_t* wide, const int64_t* n) {
  const int64_t size = n[0] == 0 ? 4 : 2;
  const bool compact = n[10] != 0;
  MoveArgs a{};
  for (int side = 0; side < 2; ++side) {
    MoveSide& s = a.side[side];
    s.from = static_cast<const char*>(side == 0 ? k : v);
    s.to = static_cast<char*>(side == 0 ? k_to : v_to);
    s.heads = n[2 + side];
    s.dim = n[5 + side];
    const int64_t rows = compact ? n[4] : n[7];
    const int64_t from[3] = {s.heads * n[4] * s.dim * size, n[4] * s.dim * size, s.dim * size};
    const int64_t to[3] = {s.heads * rows * s.dim * size, rows * s.dim * size, s.dim * size};
    for (int i = 0; i < 3; ++i) s.from_stride[i] = from[i], s.to_stride[i] = to[i];
    s.vectors = (s.dim * size) % 16 == 0;
  }
  a.idx = ints(index[0], wide[0]);
  a.new_lens = ints(index[1], wide[1]);
  a.kv_start = ints(index[2], wide[2]);
  a.lens_per_head = n[9] != 0;
  a.inv_freq = inv_freq;
  a.batch = n[1], a.length = n[4], a.width = n[7], a.index_heads = n[8];
  with_dtype(n[0], [&]<class T>() {
    const int64_t blocks = plan_move<T>(a, compact);
    if (compact) {
      launch_kv_compact<T>(a, blocks, nullptr);
    } else {
      launch_kv_gather<T>(a, blocks, nullptr);
    }
  });
}

// n: dtype B Hq Hkv Sq D DV N; all contiguous
API void emu_ragged_decode(const void* q, const void* k, const void* v, void* out, float* lse,
                           const void* const* index, const int64_t* wide, const int64_t* n,
                           float scale) {
  DecodeArgs a{};
  a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse;
  a.batch = n[1], a.q_heads = n[2], a.kv_heads = n[3], a.group = n[3] > 0 ? n[2] / n[3] : 0;
  a.num_queries = n[4], a.head_dim = n[5], a.value_dim = n[6], a.total_rows = n[7];
  a.q_stride[0] = n[2] * n[4] * n[5], a.q_stride[1] = n[4] * n[5], a.q_stride[2] = n[5];
  a.q_stride[3] = 1;
  a.k_stride = n[5], a.v_stride = n[6];
  a.k_vectors = key_vectors(a, n[0] == 0 ? 4 : 2);
  a.offsets = ints(index[0], wide[0]);
  a.lens = ints(index[1], wide[1]);
  a.scale = scale;
  std::vector<float> partial(chunk_slots(a) * a.group * a.num_queries * (2 + a.value_dim));
  a.partial = partial.data();
  with_dtype(n[0], [&]<class T>() { launch_ragged_decode<T>(a, nullptr); });
}
