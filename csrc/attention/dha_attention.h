// SPDX-License-Identifier: Apache-2.0
// dha_attention: softmax attention in which query head h reads key head kmap[h] and value head
// vmap[h] (DHA, arXiv 2406.06567, section 2). Grouped maps are GQA, identity maps plain attention.
//
//   logit_ij = scale * q_i . k_j; softcap > 0: softcap * tanh(logit / softcap); + bias_ij
//   out_i = sum_j softmax_j(logit_ij) v_j over the keys that row i sees; lse_i natural log
//
// Sequence b has Sq queries and Sk keys; row i sees keys [first, last) of visible_keys(). A row
// that sees nothing gives 0 and -inf. No matrix of size Sq x Sk is ever stored.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kNoLimit = int64_t{1} << 40, kBottomRight = INT64_MIN;

struct AttentionMask {
  int64_t left, right;  // window: i + at - left <= j <= i + at + right; kNoLimit: everything
  int64_t place = kBottomRight;  // at, the place of query 0 among the keys; kBottomRight: Sk - Sq
};

TENFOLD_HD int64_t first_place(const AttentionMask& mask, int64_t num_queries, int64_t num_keys) {
  return mask.place == kBottomRight ? num_keys - num_queries : mask.place;
}

struct KeyRange {
  int64_t first, last;  // [first, last)
};

TENFOLD_HD KeyRange visible_keys(const AttentionMask& mask, int64_t row, int64_t num_queries,
                                 int64_t num_keys) {
  const int64_t at = row + first_place(mask, num_queries, num_keys);
  const int64_t first = at - mask.left, last = at + mask.right + 1;
  return {first < 0 ? 0 : first, last > num_keys ? num_keys : last < 0 ? 0 : last};
}

// Rows of a [B, H, S, D] or [T, H, D] tensor; the last dimension is contiguous. Elements, not
// bytes.
struct RowLayout {
  int64_t batch, head, row;  // varlen: batch is 0, cu_seqlens give the first row
};

enum class BiasKind : int { none, boolean, f32, bf16, f16 };

struct AttentionBias {  // broadcast dimensions have stride 0
  const void* data;
  BiasKind kind;
  int64_t batch, head, row, key;  // strides in elements
};

// A bias of the distance alone (T5), in natural units: of query i and key j of head h
// data[h * head + zero + (i - j) * step], step 1 or -1. Lanes along queries or along keys read it
// in order.
struct RelativeBias {
  const float* data;  // null: none
  int64_t head, zero, step;
};

// Weight (b, h, i, j) is dropped where word j % 4 of the Philox counter (j / 4, i, b H + h, offset)
// is less than `below`; others are multiplied by `scale`.
struct AttentionDropout {
  uint32_t below;  // 0: none
  float scale;
  uint32_t key[2], offset;
};

// Everything a kernel of either backend needs. Pointers are host or device memory of the backend.
struct AttentionParams {
  const void *q, *k, *v;
  RowLayout q_at, k_at, v_at;
  int64_t batch, q_heads, k_heads, v_heads, head_dim, value_dim;
  int64_t max_q, max_k;         // dense: Sq, Sk
  const int32_t *cu_q, *cu_k;   // [B + 1], null for dense
  const int32_t* kv_len;        // [B], keys of each sequence of a dense batch; null: max_k
  const int32_t *kmap, *vmap;   // [H]
  int64_t lse_batch, lse_head;  // strides of lse; its rows are contiguous
  AttentionMask mask;
  AttentionBias bias;
  RelativeBias relative;
  AttentionDropout dropout;
  float scale, softcap;
  Dtype dtype;
};

struct AttentionForward : AttentionParams {
  void* out;
  RowLayout out_at;
  float* lse;
};

struct AttentionBackward : AttentionParams {
  const void *out, *dout;
  RowLayout out_at, dout_at;
  const float *lse, *dlse;  // dlse may be null; strides as lse
  void *dq, *dk, *dv;
  RowLayout dq_at, dk_at, dv_at;
  bool by_tiles;  // pairs that a mask hides may be multiplied as zeros: what they meet is finite
};

}  // namespace tenfold
