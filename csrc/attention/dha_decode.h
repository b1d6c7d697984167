// SPDX-License-Identifier: Apache-2.0
// dha_decode: attention of the newest Sq tokens over a KV cache with separate key and value heads.
// dha_cache_append_: writes new keys (rotated if asked) and values into their slots.
//
//   out[b, h, s] = softmax_j(scale * q[b, h, s] . K[b, kmap[h], j]) V[b, vmap[h], j]
//   row s is token p = kv_len - Sq + s of its sequence and sees tokens j with
//   p - window_left <= j <= p; a row that sees nothing gives 0 and lse -inf.
//
// Traffic: the rows of every used key head and value head once, whatever the maps: Sk (HK D + HV
// DV) elements per sequence. The logits of all query heads of a block of tokens are made while the
// key heads pass by, the weighted sums while the value heads do. Partial results of parts of the
// keys (max, sum, weighted values) are combined in a fixed order.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace tenfold {

constexpr int64_t kMaxDhaQueries = 16;
constexpr int64_t kMaxDhaHeadDim = 256;

enum class CacheLayout : int { contiguous, paged, ragged };

// Elements between neighbours in a cache. Token t of sequence b, head h:
//   contiguous: batch * b + token * t + head * h;
//   paged:      batch * block_table[b][t / block_size] + token * (t % block_size) + head * h;
//   ragged:     token * (offsets[b] + t) + head * h.
struct CacheStrides {
  int64_t batch, token, head;
};

struct DhaDecodeParams {
  CacheLayout layout;
  CacheStrides k, v;
  int64_t q_batch, q_head, q_query, q_dim;  // strides of q, elements
  int64_t batch, q_heads, k_heads, v_heads, num_queries, head_dim, value_dim;
  int64_t length;       // contiguous: slots of a sequence; paged: of a full block table; ragged: N
  int64_t block_size;   // paged only
  int64_t num_blocks;   // paged only: blocks of the pool
  int64_t window_left;  // -1: none
  int64_t num_splits;   // 0: chosen by the backend
  float scale, softcap;
  Dtype dtype;
};

struct DhaAppendParams {
  CacheLayout layout;
  CacheStrides k_cache, v_cache;
  int64_t k_batch, k_head, k_token, v_batch, v_head, v_token;  // strides of k and v, elements
  int64_t slot_batch, slot_token;                              // strides of slots
  int64_t cos_batch, cos_token, sin_batch, sin_token;          // 0 batch stride: shared
  int64_t batch, k_heads, v_heads, num_tokens, head_dim, value_dim;
  int64_t num_slots;   // slots must be below
  int64_t block_size;  // paged only
  bool rotate;
  Dtype dtype, angle_dtype;  // of the caches; of cos and sin
};

}  // namespace tenfold
