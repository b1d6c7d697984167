// SPDX-License-Identifier: Apache-2.0
// nacl_select (NACL section 3.4): which tokens of each (sequence, head) stay in the cache.
//
// Per row (b, h) over its valid slots [s, s + n) with counts (sink, recent, topk, random):
//   n <= sum of the counts: keep all; else keep the first `sink`, the last `recent`, of the
//   candidates between them the `topk` with the highest (pooled) score, and of what is left the
//   `random` with the largest  logit / tau-scaled + Gumbel noise  (= sampling without replacement).
//   Ties: lower slot.
// Noise of a token: word 0 of Philox4x32-10 at counter (layer, head, slot - s, row_id), key = seed.
// scores [B, H, L] float32 -> idx [B, H, C] int64 ascending, unused slots -1; new_lens int32.
// Traffic: the scores are read once from memory; keys live in working memory.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/det_math.h"
#include "core/philox.h"

namespace tenfold {

struct NaclCounts {
  int32_t sink, recent, topk, random;
};

struct NaclSelectParams {
  int64_t batch, heads, length;
  int64_t width;  // C: slots of each output row
  NaclCounts counts;
  bool counts_per_head;  // counts tensor is [B, H, 4]; then new_lens is [B, H], else [B]
  float tau;
  bool log_score;
  uint32_t seed_lo, seed_hi, layer;
  int32_t pool_kernel;  // odd; 1: no pooling
  bool pool_max;        // else average
};

// logit of the draw: score / tau, or log(score) / tau. Same bits on every backend.
TENFOLD_HD float draw_logit(float score, bool log_score, float tau) {
  return (log_score ? det_log(score) : score) / tau;
}

TENFOLD_HD float draw_key(float score, bool log_score, float tau, uint32_t word) {
  return DetScalarOps::add(draw_logit(score, log_score, tau), gumbel(word));
}

// Working memory of the CPU kernel for a row of n candidates.
struct NaclBuffers {
  uint32_t *at, *keys, *boundary;  // [n + kNaclSlack]
  uint8_t* chosen;                 // [n + kNaclSlack]
};
constexpr int64_t kNaclSlack = 16;  // elements that a vector pass may touch past the n-th

struct NaclDraw {
  int64_t wanted, left;  // to be drawn, of so many that are not chosen yet; 0 < wanted < left
  uint32_t head, first_token, row_id;
  float top;  // all scores above this are chosen already
};

// out[i] = max (NaN if any is) or mean of the `kernel`-wide window around i, over [0, n) only.
TENFOLD_ISA_DECLARE(void nacl_pool(const float* scores, int64_t n, int32_t kernel, bool use_max,
                                   float* out))
// chosen[i] = 1 for the `topk` candidates with the highest scores, 0 <= topk < n; 0 for the others.
// Returns the lowest score chosen, inf if none is.
TENFOLD_ISA_DECLARE(float nacl_choose_topk(const float* scores, int64_t n, int64_t topk,
                                           const NaclBuffers& buf))
// chosen[i] = 1 for those that are drawn. The token counter of candidate i is first_token + i.
TENFOLD_ISA_DECLARE(void nacl_choose_draws(const NaclSelectParams& p, const NaclDraw& draw,
                                           const float* scores, int64_t n, const NaclBuffers& buf))
// first + i of every chosen[i], ascending, to out; returns their number. Overwrites buf.at.
TENFOLD_ISA_DECLARE(int64_t nacl_emit(int64_t n, int64_t first, const NaclBuffers& buf,
                                      int64_t* out))

}  // namespace tenfold
