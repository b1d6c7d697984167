// SPDX-License-Identifier: Apache-2.0
// head_cka (DHA section 3.0): linear-kernel similarity of every two heads. w [H, d, m] -> [H, H]
// float32, with X = w[a]^T and Y = w[b]^T, both [m, d]:
//
//   CKA(X, Y) = ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F),  X^T Y = w[a] w[b]^T  [d, d]
//   center: each column of X, which is a row of w, has its mean subtracted first
//
// A blocked Gram product whose squares are summed block by block: no [H d, H d] matrix exists.
// Heads are cut into blocks of at most kGramRows rows; block pairs (a, b) with a <= b are computed,
// about H^2 d^2 m FLOPs, half of the whole matrix.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kGramRows = 128, kGramDepth = 128;  // rows of a block, columns of a step
// Block pairs that share a packed block b: packing transposes, which costs a fifth of one product.
constexpr int64_t kGramRun = 8;
// Rows of a strip lie this many floats apart: odd in cache lines, so that they use all sets.
constexpr int64_t kGramPitch = kGramDepth + 16;
constexpr int64_t kGramPadding = 32;  // rows of zeros behind a block: up to a whole tile

struct GramProblem {
  const void* w;
  int64_t head_stride, row_stride;  // elements
  int64_t dims, length;
  int64_t blocks;  // of a head
  Dtype dtype;
  const float* mean;  // [H][dims] to subtract, or null
};

// Rows of a block.
constexpr int64_t rows_of(const GramProblem& p, int64_t block) {
  const int64_t left = p.dims - block % p.blocks * kGramRows;
  return left < kGramRows ? left : kGramRows;
}

struct GramRun {
  int64_t a, num_a;  // blocks a, a + 1, ...; at most kGramRun
  int64_t b;
  double* squares;  // [num_a] out: sum of squares of the products of all their rows
  float* scratch;   // gram_scratch() or gram_tiles_scratch() floats, 64-byte aligned
};

constexpr int64_t gram_scratch() {
  constexpr int64_t rows = kGramRows + kGramPadding;
  return 2 * rows * kGramPitch + rows * kGramDepth + kGramRun * rows * rows;
}

TENFOLD_ISA_DECLARE_BF16(void gram_run(const GramProblem& p, const GramRun& run))
TENFOLD_ISA_DECLARE_BF16(float row_mean(const void* row, Dtype dtype, int64_t length))

#if defined(TENFOLD_X86)
namespace avx512_amx {
// Blocks are packed first, each on its own: a copy of w. All sizes are floats.
int64_t gram_tiles_packed(const GramProblem& p, int64_t heads);
void gram_tiles_pack(const GramProblem& p, int64_t block, float* packed);
int64_t gram_tiles_scratch();
void gram_tiles_run(const GramProblem& p, const float* packed, const GramRun& run);
}  // namespace avx512_amx
#endif

// bf16 without centring, by AMX tiles.
inline bool gram_by_tiles(Isa isa, const GramProblem& p) {
  return isa == Isa::avx512_amx && p.dtype == Dtype::bf16 && p.mean == nullptr;
}

}  // namespace tenfold
