// SPDX-License-Identifier: Apache-2.0
// linear_cross_entropy tile by tile, for linear_cross_entropy.cpp. A chunk of rows meets the
// vocabulary:
//   1. logits of a tile, transposed: x[v][rows], lanes hold rows; their maximum and sum of a row;
//   2. with every row's lse: gradients d of the logits of a tile, packed for both products,
//      grad_weight[tile] += d^T hidden, owned by the tile's task, then
//      grad_hidden[rows] += d weight, owned by the rows' task, a block of tiles at a time.
// The products are those of core/cpu/packed.h: panels of rows times tiles of lanes, in strips of
// words that stay in the first cache. A word is a float, or where there are bf16 dot products two
// neighbouring bf16 along the depth.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

struct LceProblem {
  const void* hidden;
  const void* weight;
  int64_t hidden_stride, weight_stride;  // elements between rows
  int64_t dim, vocab;
  Dtype dtype;
  float softcap, scale;  // 0: none; 1 / temperature
};

// Rows that count, packed. Arrays of a row have `pitch` floats, those past `count` are 0; so have
// the rows of x.
struct LceChunk {
  int64_t count, pitch;
  const int64_t *row, *target;  // of hidden; in [0, vocab)
  float* lanes;                 // hidden for the logits: tiles [words of dim][lanes]
  float* cols;                  // hidden for grad_weight: tiles [words of rows][lanes]
  float* chosen;                // softcapped logit of the target
  const float *lse, *of_p, *of_id, *of_entropy, *entropy;  // both null if 0
};

// exp of the logits of a tile less the row's largest of the tile, in 16 bits: rows of tokens
// `pitch` apart. They need a factor a row to be probabilities.
struct LceExps {
  uint16_t* data;
  int64_t pitch;
};

// Panels lie an odd number of cache lines apart: a power of two would put what is written together
// into one cache set.
constexpr int64_t kLcePad = 16;
constexpr int64_t kLceLanes = 48;  // a multiple of every ISA's lanes of a tile
constexpr int64_t kLceTile = 256;  // tokens of the vocabulary: a whole number of strips
constexpr int64_t kLceCols = 384;  // of a tile of a gradient

constexpr int64_t lce_whole(int64_t n, int64_t of) {
  return (n + of - 1) / of * of;
}
// Floats of n columns as tiles of lanes, and of n rows as panels of some rows each; the depth is in
// whole words, see LcePacking.
constexpr int64_t lce_lanes_size(int64_t n, int64_t depth) {
  return lce_whole(n, kLceLanes) / kLceLanes * (kLceLanes * depth + 8 * kLcePad);
}
constexpr int64_t lce_panel_stride(int64_t depth, int64_t rows) {
  return rows * depth + kLcePad;
}
constexpr int64_t lce_panels_size(int64_t n, int64_t depth, int64_t rows) {
  return lce_whole(n, rows) / rows * lce_panel_stride(depth, rows);
}
// Of n rows, of which a sum is kept for each lane: an odd number of cache lines.
constexpr int64_t lce_pitch(int64_t n) {
  return (lce_whole(n, 16) / 16 | 1) * 16;
}

// Elements of a word, what a depth in words is a multiple of, rows of a panel; and tokens of a tile
// whose rows of weight are packed at a time for the logits.
struct LcePacking {
  int64_t word, unit, panel, tokens;
  int64_t words(int64_t n) const { return lce_whole((n + word - 1) / word, unit); }
};
TENFOLD_ISA_DECLARE_AMX(LcePacking lce_packing(Dtype dtype))
// Tile `tile` of kLceLanes rows of a chunk -> lanes; columns [col, col + n) of all its rows ->
// cols, col a multiple of kLceLanes.
TENFOLD_ISA_DECLARE_AMX(void lce_pack_lanes(const LceProblem& p, const LceChunk& c, int64_t tile,
                                            float* staged))
TENFOLD_ISA_DECLARE_AMX(void lce_pack_cols(const LceProblem& p, const LceChunk& c, int64_t col,
                                           int64_t n))
// Step 1 for tokens [v, v + n): x [n, in whole panels][pitch], and c.chosen. panels: room for n
// rows of weight.
TENFOLD_ISA_DECLARE_AMX(void lce_logits(const LceProblem& p, const LceChunk& c, int64_t v,
                                        int64_t n, float* panels, float* staged, float* x))
// Of a tile: maximum, sum of exp and of exp times distance from the maximum (if wanted): pitch
// each. exps: where each exp goes, or null.
TENFOLD_ISA_DECLARE_AMX(void lce_sums(const LceProblem& p, const LceChunk& c, int64_t n,
                                      const float* x, bool weighted, const LceExps& exps,
                                      float* sums))
// Of all `tiles`, 3 pitch apart, in order, into the first ones'.
TENFOLD_ISA_DECLARE_AMX(void lce_join(const LceChunk& c, int64_t tiles, bool weighted, float* sums))
// x to rows `kept_pitch` apart.
TENFOLD_ISA_DECLARE_AMX(void lce_keep(const LceChunk& c, int64_t n, const float* x, float* kept,
                                      int64_t kept_pitch))
// Step 2: from x (rows `x_pitch` apart) d of a tile as panels of rows `stride` apart, the depth
// along the tokens, and of tokens, the depth along the rows. Either may be null.
TENFOLD_ISA_DECLARE_AMX(void lce_deltas(const LceProblem& p, const LceChunk& c, int64_t v,
                                        int64_t n, const float* x, int64_t x_pitch, float* by_row,
                                        int64_t stride, float* by_token))
// Step 2 from exps, where d is a probability times a slope of the row, but for the target:
// factors of a tile whose maxima are `top` to 2^base, whole numbers not below any maximum / ln 2.
// Their mantissas do not depend on the base, so that sums do not depend on when it was raised.
TENFOLD_ISA_DECLARE_AMX(void lce_row_factors(const LceChunk& c, const float* top, const float* base,
                                             float* factor))
// exps times factors -> by_row as above; 0 where the target is: what is left of 1 may be small, and
// is added at the end.
TENFOLD_ISA_DECLARE_AMX(void lce_exps_by_row(Dtype dtype, const LceChunk& c, int64_t first,
                                             int64_t n, const LceExps& exps, const float* factor,
                                             float* by_row, int64_t stride))
// d -> by_token as above. factor: room for a float a row; c.chosen holds log-probabilities here.
TENFOLD_ISA_DECLARE_AMX(void lce_exps_by_token(const LceProblem& p, const LceChunk& c,
                                               int64_t first, int64_t n, const LceExps& exps,
                                               const float* top, float* factor, float* by_token))
// sums = factor sums + of_target weight[target]; whether all sums were finite.
TENFOLD_ISA_DECLARE_AMX(bool lce_finish_row(const LceProblem& p, int64_t target, float factor,
                                            float of_target, float* sums))
// Tokens [v, v + n) of weight -> tiles of lanes, `depth` words of tokens each; these from `at` on.
TENFOLD_ISA_DECLARE_AMX(void lce_pack_weight(const LceProblem& p, int64_t v, int64_t n, int64_t at,
                                             int64_t depth, float* cols))

// Rows of grad_weight: added to `before` first (floats, `before_pitch` apart) unless null; then
// stored as floats or as the dtype.
struct LceWeightTile {
  int64_t n, col, cols;
  const float* by_token;
  float* scratch;
  const float* before;
  int64_t before_pitch;
  Dtype dtype;
  void* out;
  int64_t out_pitch;
  bool past;  // past the caches
};
TENFOLD_ISA_DECLARE_AMX(void lce_weight_tile(const LceChunk& c, Dtype dtype,
                                             const LceWeightTile& t))
// sums [rows][pitch] (+)= panels of d * columns [col, col + cols) of tiles of weight.
TENFOLD_ISA_DECLARE_AMX(void lce_hidden_tile(Dtype dtype, int64_t rows, int64_t cols, int64_t depth,
                                             const float* by_row, int64_t stride,
                                             const float* weight, int64_t weight_depth, int64_t col,
                                             float* sums, int64_t pitch, bool add))
TENFOLD_ISA_DECLARE_AMX(void lce_store(const float* from, int64_t n, Dtype dtype, void* to))

}  // namespace tenfold
