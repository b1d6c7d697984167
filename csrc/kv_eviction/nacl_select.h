// nacl_select (NACL section 3.4): which tokens of each (sequence, head) stay in the cache.
//
// Per row (b, h) over its valid slots [s, s + n) with counts (sink, recent, topk, random):
//   n <= sum of the counts: keep all; else keep the first `sink`, the last `recent`, of the
//   candidates between them the `topk` with the highest (pooled) score, and of what is left the
//   `random` with the largest  logit / tau-scaled + Gumbel noise  (= sampling without replacement).
//   Ties: lower slot.
// Noise of a token: word 0 of Philox4x32-10 at counter (layer, head, slot - s, row_id), key = seed.
// scores [B, H, L] float32 -> idx [B, H, C] int64 ascending, unused slots -1; new_lens int32.
// Traffic: the scores are read once from memory; keys live in a scratch of 4 bytes per candidate.
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

// A threshold that splits keys into exactly the wanted number of chosen ones: all above `key`, and
// the first `ties` of those equal to it.
struct NaclCut {
  uint32_t key;
  int64_t ties;
};

// out[i] = max (NaN if any is) or mean of the `kernel`-wide window around i, over [0, n) only.
TENFOLD_ISA_DECLARE(void nacl_pool(const float* scores, int64_t n, int32_t kernel, bool use_max,
                                   float* out))
TENFOLD_ISA_DECLARE(void nacl_topk_keys(const float* scores, int64_t n, uint32_t* keys))
// draw[i] of candidates whose token counter is first_token + i; 0 where keys[i] is.
TENFOLD_ISA_DECLARE(void nacl_draw_keys(const NaclSelectParams& p, const float* scores, int64_t n,
                                        uint32_t first_token, uint32_t head, uint32_t row_id,
                                        const uint32_t* keys, uint32_t* draw))
// The cut that chooses `wanted` of the nonzero keys, 0 < wanted <= their number. boundary [n + 16]
// is working memory.
TENFOLD_ISA_DECLARE(NaclCut nacl_cut(const uint32_t* keys, int64_t n, int64_t wanted,
                                     uint32_t* boundary))
// keys[i] = 0 wherever the cut chooses by[i].
TENFOLD_ISA_DECLARE(void nacl_take(const uint32_t* by, int64_t n, NaclCut cut, uint32_t* keys))
// first + i of every key that is 0, ascending, to out [count + 16]; returns the count.
TENFOLD_ISA_DECLARE(int64_t nacl_emit(const uint32_t* keys, int64_t n, uint32_t first,
                                      uint32_t* out))

}  // namespace tenfold
