// SPDX-License-Identifier: Apache-2.0
// Inner kernel of decode attention on CPU, shared by ragged_decode and dha_decode: some query rows
// against some tokens of a cache whose keys and values may have different head groups.
//
//   logit[r][j] = q_r . k_j(key head of r);  w = 2^(cap(scale logit) - max);  out_r = sum_j w v_j
//
// Tokens are taken in blocks. While the key heads of a block pass by, the logits of all rows are
// made; then every row's running softmax; then the value heads pass by. So each row of k and v is
// read once, also where keys and values group the query rows differently. The kernel knows nothing
// of cache layouts: tokens come as runs with a constant stride.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

// Tokens at a constant stride; the pointers are the first token's, before any head's offset.
struct DecodeRun {
  const void* k;
  const void* v;
  int64_t num_keys;
};

// A key head or value head, and the query rows that use it.
struct DecodeHead {
  int64_t offset;     // elements from a token to this head's row
  int64_t first_row;  // key head: rows [first_row, first_row + num_rows)
  int64_t num_rows;   // value head: the rows value_rows[first_row ...]
};

struct DecodeTask {
  const DecodeRun* runs;
  int64_t num_runs, num_keys;  // tokens of all runs together
  int64_t k_stride, v_stride;  // elements between tokens of a run
  const DecodeHead* key_heads;
  const DecodeHead* value_heads;
  const int32_t* value_rows;
  int64_t num_key_heads, num_value_heads;
  const float* q;  // [rows][decode_pitch(head_dim)], zero padded, not scaled; values of the dtype
  const int64_t* begin;  // [rows] token j of the task is seen by row r if
  const int64_t* end;    // begin[r] <= j < end[r] (any integers)
  int64_t rows, head_dim, value_dim;
  float scale;    // of the logits
  float softcap;  // 0: none
  // Added to the logits of row r and token j, in natural units: bias[j - r]. Null: none.
  const float* bias = nullptr;
  Dtype dtype;
  float* max;      // [rows] out: largest logit in log2 units, or kDecodeNothing
  float* sum;      // [rows] out: sum of the weights
  float* out;      // [rows][decode_pitch(value_dim)] out: sum of the weights * v
  float* scratch;  // decode_scratch(rows, head_dim) floats
};

constexpr float kDecodeNothing = -1e30f;  // the maximum of a row that sees nothing
constexpr int64_t kDecodeKeyBlock = 256;  // tokens of a block
constexpr int64_t decode_pitch(int64_t d) {
  return (d + 15) / 16 * 16;
}  // floats, widest vector
// Weights of a block; queries and weights in bf16 where they are multiplied as such.
constexpr int64_t decode_scratch(int64_t rows, int64_t head_dim) {
  return rows * (kDecodeKeyBlock + decode_pitch(head_dim) + kDecodeKeyBlock / 2);
}
// Result of one task: max [rows], sum [rows], out [rows][pitch].
constexpr int64_t decode_partial(int64_t rows, int64_t value_dim) {
  return rows * (2 + decode_pitch(value_dim));
}

TENFOLD_ISA_DECLARE_BF16(void decode_task(const DecodeTask& t))

// Copies a query row of any dtype and stride to float and pads it with zeros.
void decode_load_query(const void* q, Dtype dtype, int64_t stride, int64_t head_dim, float* to);

// Combines the partial results of `num_tasks` tasks of the same rows, in their order, and writes
// row r to out + out_rows[r] * value_dim (elements of `dtype`) and lse[out_rows[r]].
struct DecodeResult {
  const float* partials;  // one decode_partial(rows, value_dim) after another
  int64_t num_tasks, rows, value_dim;
  const int64_t* out_rows;
  Dtype dtype;
  void* out;
  float* lse;
};
void decode_combine(const DecodeResult& r);

}  // namespace tenfold
