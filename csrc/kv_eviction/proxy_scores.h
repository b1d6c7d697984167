// SPDX-License-Identifier: Apache-2.0
// proxy_scores (NACL, arXiv 2408.03675, section 3): how much a few proxy queries attend to each
// key.
//
//   score_h[j] = sum over active proxies w of softmax_j(scale * q_w . k_j)     [B, Hq, L]
//   scores     = mean | sum | max of score_h over the query heads of a key head [B, Hkv, L] float32
//   lse        = log sum_j exp(scale * q_w . k_j) per row                       [B, Hq, W] float32
//
// q [B, Hq, W, D], k [B, Hkv, L, D]: float32, bfloat16 or float16, rows contiguous, else any
// strides. A proxy sits at slot p of the key axis. It is active iff p is a valid key slot; it sees
// the valid keys j with (not causal or j <= p) and (window < 0 or p - j < window). Inactive proxies
// contribute 0 and have lse -inf.
//
// FLOPs 2 * B * Hq * W * L * D for the logits. Bytes at least: k once + 4 * B * Hkv * L.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

enum class ScoreReduce : int { mean, sum, max };

struct ProxyScoresParams {
  const void* q;
  const void* k;
  const float* lse_in;  // [B, Hq, W] or null: then the kernel finds the row sums itself
  float* scores;        // [B, Hkv, L]
  float* lse_out;       // [B, Hq, W]; unused if lse_in is given
  Dtype dtype;
  int64_t batch, q_heads, kv_heads, num_proxies, length, head_dim;
  int64_t q_stride[3], k_stride[3];  // elements; batch, head, row
  const int32_t* positions;          // [B, W]: slot of each proxy, negative if inactive
  const int32_t* kv_begin;           // [B]
  const int32_t* kv_end;             // [B]
  const int32_t* head_list;          // [Hq]: query heads ordered by key head
  const int32_t* head_begin;         // [Hkv + 1]: where each key head's query heads start
  float scale;
  bool causal;
  int32_t window;  // negative: none
  ScoreReduce reduce;
};

// One CPU task: chunk `chunk` of the proxy rows of key head (batch b, head h). It adds the column
// sums of its rows to `partial` [L] (zeroed by the caller).
struct ProxyScoresTask {
  int64_t b, h;
  int64_t row_begin, row_end;  // rows of the key head: index = head_in_group * W + proxy
  float* partial;
  void* scratch;  // proxy_scores_scratch bytes, 64-byte aligned
};

TENFOLD_ISA_DECLARE_AMX(void proxy_scores_task(const ProxyScoresParams& p,
                                               const ProxyScoresTask& t))
TENFOLD_ISA_DECLARE_AMX(int64_t proxy_scores_scratch(const ProxyScoresParams& p))
TENFOLD_ISA_DECLARE_AMX(int64_t proxy_scores_tile_rows())

}  // namespace tenfold
