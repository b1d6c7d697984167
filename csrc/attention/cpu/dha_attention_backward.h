// SPDX-License-Identifier: Apache-2.0
// Between the registration and the ISA kernel of dha_attention_backward.
#pragma once

#include <cstdint>

#include "attention/dha_attention.h"
#include "core/cpu/isa.h"

namespace tenfold {

// Queries and keys of a tile; blocks of keys start at multiples of it. A multiple of the register
// blocks of every ISA (12, 6, 4 rows; 32, 16, 8 lanes).
constexpr int kBackwardBlock = 96;

// Some query rows of one (sequence, query head): dq of these rows is written, their shares of dk
// and dv go to memory of their own, so that tasks need not wait for each other.
struct AttentionBackwardTask {
  int64_t batch, head;
  int64_t q_first, k_first;       // packed batches: first rows of the sequence; dense: 0
  int64_t num_queries, num_keys;  // of the sequence
  int64_t row_begin, row_end;     // queries of this task
  int64_t key_begin, key_end;     // what they see; key_begin is a multiple of kBackwardBlock
  float* distances;               // [relative.head] sums of dS by distance of its own, or null
  float *dk, *dv;                 // [key_end - key_begin, pitch of D or DV] unscaled, whole blocks
  void* scratch;                  // attention_backward_scratch bytes, 64-byte aligned
};

// Floats of a row of a share of dk or dv.
constexpr int64_t backward_pitch(int64_t dim) {
  return (dim + 15) / 16 * 16;
}

// A task's share of a head's gradient: keys [first, last).
struct GradientShare {
  const float* rows;
  int64_t first, last;
};

// Rows [row_begin, row_end) of one head's dk or dv: scale * (sum of acc and the shares, in order).
struct GradientSum {
  const GradientShare* shares;
  int64_t num_shares, pitch, dim, row_begin, row_end;
  float scale;
  const float* acc_in;  // sum of earlier shares, or null
  float* acc_out;       // where more shares will follow: the sum, unscaled; else null
  int64_t acc_row;
  void* out;  // used where acc_out is null
  int64_t out_row;
  Dtype dtype;
};

TENFOLD_ISA_DECLARE_BF16(void attention_backward_task(const AttentionBackward& p,
                                                      const AttentionBackwardTask& t))
TENFOLD_ISA_DECLARE_BF16(int64_t attention_backward_scratch(const AttentionBackward& p))
TENFOLD_ISA_DECLARE_BF16(void sum_gradient(const GradientSum& s))

#if defined(TENFOLD_X86)
namespace avx512_amx {  // bf16 by AMX tiles, where AttentionBackward::by_tiles allows it
int64_t attention_backward_tiles_scratch(const AttentionBackward& p);
void attention_backward_tiles_task(const AttentionBackward& p, const AttentionBackwardTask& t);
bool all_finite(const bf16_t* row, int64_t n);
}  // namespace avx512_amx
#endif

inline bool attention_backward_by_tiles(Isa isa, const AttentionBackward& p) {
  return isa == Isa::avx512_amx && p.by_tiles && p.dtype == Dtype::bf16;
}

// Which way a relative bias must lie: RelativeBias::step.
inline int64_t attention_backward_bias_step(Isa isa, const AttentionBackward& p) {
  return attention_backward_by_tiles(isa, p) ? 1 : -1;
}

}  // namespace tenfold
