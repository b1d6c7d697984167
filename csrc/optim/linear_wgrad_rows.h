// SPDX-License-Identifier: Apache-2.0
// linear_wgrad_rows (HFT section 7): the weight gradient of a linear layer of which only some rows
// train. With T tokens,
//
//   out[r, :] = sum over t of grad_out[t, rows[r]] * input[t, :]       [R, in], dtype of input
//
// grad_out [T, out], input [T, in], rows [R] strictly increasing; sums are float32, rounded once.
// 2 R T in FLOPs: R / out of the whole product.
//
// First the chosen columns of grad_out and a block of columns of input are packed, once: strips of
// kWgradDepth words along the tokens, in each of them panels of a few lanes. Then a task owns a
// tile of the output and multiplies panels, strip by strip, adding to the tile's float32 sums. A
// word is a float, or where there are bf16 dot products the bf16 of two tokens.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kWgradDepth = 128;                       // a panel of columns fits L1
constexpr int64_t kWgradRows = 192, kWgradCols = 768;      // of a tile: whole panels of every ISA
constexpr int64_t kWgradRowStep = 24, kWgradColStep = 96;  // multiples of every panel's lanes

struct WgradProblem {
  const void* grad_out;
  const void* input;
  int64_t grad_stride, input_stride;  // elements between tokens
  int64_t tokens;
  const int64_t* rows;  // columns of grad_out
  int64_t num_rows, num_cols;
  Dtype dtype;
  void* out;  // [num_rows, num_cols]
};

// A tile of the output, its packed rows and columns (from the first strip on), and its sums.
struct WgradTile {
  int64_t row, rows, col, cols;
  const float *row_panels, *col_panels;
  int64_t row_strip, col_strip;  // floats from strip to strip
  float* sums;                   // wgrad_sums(), like the panels 64-byte aligned
};

// Panels lie an odd number of cache lines apart: a power of two would put what is written together
// into one cache set.
constexpr int64_t kWgradPanelPad = 16;

constexpr int64_t wgrad_whole(int64_t n, int64_t of) {
  return (n + of - 1) / of * of;
}

// Floats of one packed strip of a tile's rows or columns; panels are 4 rows or 8 columns
// wide at least.
constexpr int64_t wgrad_row_strip(int64_t rows) {
  const int64_t n = wgrad_whole(rows, kWgradRowStep);
  return n * kWgradDepth + n / 4 * kWgradPanelPad;
}
constexpr int64_t wgrad_col_strip(int64_t cols) {
  const int64_t n = wgrad_whole(cols, kWgradColStep);
  return n * kWgradDepth + n / 8 * kWgradPanelPad;
}

constexpr int64_t wgrad_sums(int64_t rows, int64_t cols) {
  return wgrad_whole(rows, kWgradRowStep) * wgrad_whole(cols, kWgradColStep);
}

// Tokens of a strip.
TENFOLD_ISA_DECLARE_BF16(int64_t wgrad_strip_tokens(Dtype dtype))
// Packs strip number `strip` of the rows [row, row + rows), or of the columns [col, col + cols).
TENFOLD_ISA_DECLARE_BF16(void wgrad_pack_rows(const WgradProblem& p, int64_t row, int64_t rows,
                                              int64_t strip, float* panels))
TENFOLD_ISA_DECLARE_BF16(void wgrad_pack_cols(const WgradProblem& p, int64_t col, int64_t cols,
                                              int64_t strip, float* panels))
TENFOLD_ISA_DECLARE_BF16(void wgrad_tile(const WgradProblem& p, const WgradTile& tile))

}  // namespace tenfold
