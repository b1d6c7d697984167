// SPDX-License-Identifier: Apache-2.0
// kv_gather / kv_compact_ (NACL section 3.4 step 4): keep the chosen tokens of a KV cache.
//
//   k'[b, h, c] = k[b, h, idx[b, h', c]],  v' likewise;  h' = h, or 0 if idx is shared by all heads
//   with inv_freq: key slot c is rotated by (c - (idx - kv_start[b])) * inv_freq (rotate_half RoPE)
// Slots c >= new_lens or with idx < 0: kv_gather writes zeros, kv_compact_ leaves them alone.
// kv_compact_ writes into the first slots of k and v themselves: idx is strictly increasing, so a
// token never moves up and ascending order overwrites nothing that is still needed.
//
// Traffic: read + write of every kept row, 2 * B * C * (HK * D + HV * DV) * bytes.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

struct KvMove {
  const char* from;                // source rows of one (b, head)
  char* to;                        // destination rows; may be the same memory (compaction)
  int64_t from_stride, to_stride;  // bytes
  int64_t row_bytes;
  bool stream;  // write past the caches: rows and destination are 64-byte aligned, output is large
};

struct IndexFacts {
  int64_t min, max;
  bool increasing;
};

// Rotations by whole slots from two small tables (the angle of |shift| is the sum of a coarse and a
// fine one), so that no row needs a sine. Entry e of a table: cos [half], then sin [half].
struct RotaryTable {
  static constexpr int64_t kFine = 256;
  const float* coarse;  // angles e * kFine * inv_freq
  const float* fine;    // angles e * inv_freq
  int64_t half;         // head_dim / 2
};

// Rotates one key row in place by `shift` slots.
TENFOLD_ISA_DECLARE(void rotate_row(void* row, Dtype dtype, const RotaryTable& table,
                                    int64_t shift))
TENFOLD_ISA_DECLARE(IndexFacts index_facts(const int64_t* idx, int64_t n))
// Moves rows idx[0 .. n) (all >= 0) to slots 0 .. n; runs of neighbours move as one block.
TENFOLD_ISA_DECLARE(void move_rows(const KvMove& m, const int64_t* idx, int64_t n))

}  // namespace tenfold
