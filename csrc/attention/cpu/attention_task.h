// SPDX-License-Identifier: Apache-2.0
// How the CPU kernels of dha_attention cut their work, and their ISA entry points. Query rows of
// heads that share key and value head form a group; its rows are cut into tiles of lanes, and a
// task is a run of tiles of one sequence and group, for which keys and values are packed once.
#pragma once

#include "attention/dha_attention.h"
#include "core/cpu/isa.h"

namespace tenfold {

// Sequence b: its first rows in the tensors (after the batch stride) and its lengths.
struct AttentionSequence {
  int64_t q_first, k_first, num_queries, num_keys;
};

TENFOLD_HD AttentionSequence attention_sequence(const AttentionParams& p, int64_t b) {
  if (p.cu_q == nullptr) return {0, 0, p.max_q, p.kv_len != nullptr ? p.kv_len[b] : p.max_k};
  return {p.cu_q[b], p.cu_k[b], p.cu_q[b + 1] - p.cu_q[b], p.cu_k[b + 1] - p.cu_k[b]};
}

// Query heads with the same key head and the same value head.
struct AttentionGroup {
  const int32_t* heads;
  int64_t num_heads, key_head, value_head;
};

// Tiles of a group in one sequence: a long sequence gives every head tiles of its own, and the
// tiles of all heads at one place follow each other; of a short one a tile takes several heads.
TENFOLD_HD int64_t attention_heads_per_tile(int64_t num_queries, int64_t tile_rows) {
  return num_queries > 0 && num_queries < tile_rows ? tile_rows / num_queries : 1;
}

TENFOLD_HD int64_t attention_num_tiles(int64_t num_heads, int64_t num_queries, int64_t tile_rows) {
  if (num_queries == 0) return 0;
  const int64_t together = attention_heads_per_tile(num_queries, tile_rows);
  return together > 1 ? (num_heads + together - 1) / together
                      : num_heads * ((num_queries + tile_rows - 1) / tile_rows);
}

struct AttentionTask {
  AttentionGroup group;
  int64_t sequence, tile_begin, tile_end;
};

TENFOLD_ISA_DECLARE_AMX(int64_t attention_tile_rows(); int64_t attention_most_tiles();
                        int64_t attention_scratch(const AttentionForward& p);
                        void attention_forward_task(const AttentionForward& p,
                                                    const AttentionTask& t, void* scratch))

}  // namespace tenfold
