// linear_wgrad_rows (HFT section 7): the weight gradient of a linear layer of which only some rows
// train. With T tokens,
//
//   out[r, :] = sum over t of grad_out[t, rows[r]] * input[t, :]       [R, in], dtype of input
//
// grad_out [T, out], input [T, in], rows [R] strictly increasing; sums are float32, rounded once.
// 2 R T in FLOPs: R / out of the whole product.
//
// A task owns a tile of the output. For every strip of kWgradDepth words along the tokens it packs
// the chosen columns of grad_out and its columns of input into panels of a few lanes, and
// multiplies the panels, adding to the tile's float32 sums. A word is a float, or where there are
// bf16 dot products the bf16 of two tokens.
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

struct WgradTile {
  int64_t row, rows, col, cols;
  float* scratch;  // wgrad_scratch() floats, 64-byte aligned
};

// Panels lie an odd number of cache lines apart: a power of two would put what is written together
// into one cache set.
constexpr int64_t kWgradPanelPad = 16;

constexpr int64_t wgrad_scratch() {
  constexpr int64_t kMostPanels = (kWgradRows + kWgradCols) / 4;
  return (kWgradRows + kWgradCols) * kWgradDepth + kMostPanels * kWgradPanelPad +
         kWgradRows * kWgradCols;
}

TENFOLD_ISA_DECLARE(void wgrad_tile(const WgradProblem& p, const WgradTile& tile))

}  // namespace tenfold
