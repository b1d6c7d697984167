// linear_wgrad_rows (HFT section 7): the weight gradient of a linear layer of which only some rows
// train. With T tokens,
//
//   out[r, :] = sum over t of grad_out[t, rows[r]] * input[t, :]       [R, in], dtype of input
//
// grad_out [T, out], input [T, in], rows [R] strictly increasing; sums are float32, rounded once.
// 2 R T in FLOPs: R / out of the whole product.
//
// A task owns a tile of the output. For every strip of kWgradDepth tokens it packs the chosen
// columns of grad_out and its columns of input into panels of a few lanes, as float32 or as pairs
// of bf16 (two tokens in a word) where there are bf16 dot products, and multiplies the panels,
// adding to the tile's float32 sums.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kWgradDepth = 256;                     // words of a strip along the tokens
constexpr int64_t kWgradRows = 192, kWgradCols = 384;    // of a tile: multiples of all panels
constexpr int64_t kWgradRowPad = 16, kWgradColPad = 64;  // a last panel may be partly unused

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

struct WgradTile {
  int64_t row, rows, col, cols;
  float* scratch;  // wgrad_scratch() floats, 64-byte aligned
};

constexpr int64_t wgrad_scratch() {
  constexpr int64_t rows = kWgradRows + kWgradRowPad, cols = kWgradCols + kWgradColPad;
  return (rows + cols) * kWgradDepth + rows * cols;
}

TENFOLD_ISA_DECLARE(void wgrad_tile(const WgradProblem& p, const WgradTile& tile))

}  // namespace tenfold
