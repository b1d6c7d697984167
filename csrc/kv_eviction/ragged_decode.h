// ragged_decode: attention of the newest Sq tokens over one flat cache of per-(sequence, head)
// segments.
//
//   segment i = b * Hkv + h: rows [offsets[i], offsets[i] + n_i) of k [N, D] and v [N, DV]
//   out[b, hq, s] = softmax_j(scale * q . k_j) v_j over the first n_i - (Sq - 1 - s) rows, hq in
//   group h lse = natural log-sum-exp of the scaled logits; an empty row gives 0 and -inf.
//
// A long segment is split into chunks of keys; each gives (max, sum, weighted values) and the
// chunks of a row are combined in order. Traffic: k and v once, read by all G * Sq query rows of
// the head together. DecodeChunk knows nothing of offsets: other cache layouts use the same inner
// kernel.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

struct DecodeChunk {
  const void* k;  // first key row of the chunk
  const void* v;
  int64_t k_stride, v_stride;  // elements between rows
  int64_t num_keys;            // rows of this chunk
  const float* q;              // [rows][pitch(head_dim)], scaled by scale * log2(e), zero padded
  const int64_t* visible;      // [rows]: how many keys of this chunk each row sees (may be <= 0)
  int64_t rows, head_dim, value_dim;
  Dtype dtype;
  float* max;      // [rows] out: largest logit in log2 units, or -1e30 if the row sees nothing
  float* sum;      // [rows] out: sum of 2^(logit - max)
  float* out;      // [rows][pitch(value_dim)] out: sum of 2^(logit - max) * v
  float* scratch;  // [rows][kKeyBlock]
};

constexpr int64_t kDecodeKeyBlock = 64;  // keys whose k and v stay in L1/L2
constexpr int64_t decode_pitch(int64_t d) {
  return (d + 15) / 16 * 16;
}  // floats, widest vector

TENFOLD_ISA_DECLARE(void decode_chunk(const DecodeChunk& c))

}  // namespace tenfold
