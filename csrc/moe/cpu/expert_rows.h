// SPDX-License-Identifier: Apache-2.0
// What follows the products of experts, row by row: activation and its gradient, rounding, and the
// sum over a token's slots. Sums are rows kMoePitch apart (products.h).
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"
#include "moe/cpu/products.h"

namespace tenfold {

// Float rows that are added to sums: row i is data + (gather ? gather[i] : i) * stride; null: none.
struct MoeBase {
  const float* data = nullptr;
  int64_t stride = 0;
  const int32_t* gather = nullptr;
  const float* row(int64_t i) const { return data + (gather != nullptr ? gather[i] : i) * stride; }
};

// Rows [first, first + rows) of a tile.
struct MoeTileRows {
  int64_t first, rows, cols;
};

// out = factor (scale sums + base); a factor per row (by `first`), or 1.
struct MoeStore {
  const float* sums;
  float scale;
  const float* factor;
  Dtype dtype;
  void* out;  // row 0, the tile's first column
  int64_t stride;
};
TENFOLD_ISA_DECLARE_BF16(void moe_store(const MoeTileRows& t, const MoeStore& s))

// a = factor silu(g) u of g = gate + base, u = up + base; g and u are stored as well unless null.
struct MoeSwiglu {
  const float *gate, *up;
  MoeBase base_gate, base_up;  // at the tile's first column
  const float* factor;
  Dtype dtype;
  void* a;  // row 0, the tile's first column
  int64_t a_stride;
  void *g, *u;
  int64_t g_stride;
};
TENFOLD_ISA_DECLARE_BF16(void moe_swiglu(const MoeTileRows& t, const MoeSwiglu& s))

// From y = the gradient of a before its factor w (sums + base) and g, u:
//   dot[row] = <y, a>, dg = w y u s (1 + g (1 - s)), du = w y silu(g), wa = w a;  s = sigmoid(g).
struct MoeSwigluBackward {
  const float* sums;
  MoeBase base;
  const float* factor;
  Dtype dtype;
  const void *g, *u;  // row 0, the tile's first column; so below
  void *dg, *du;
  int64_t g_stride;
  void* wa;
  int64_t wa_stride;
  float* dot;
};
TENFOLD_ISA_DECLARE_BF16(void moe_swiglu_backward(const MoeTileRows& t, const MoeSwigluBackward& s))

// out[t] = base[t] + the sum over j < k of in[at[t k + j]], in this order, of positions below
// `routed`.
struct MoeCombine {
  const int32_t* at;
  int64_t k, routed;
  Dtype from;
  const void* in;
  int64_t in_stride;
  MoeBase base;
  Dtype dtype;
  void* out;
  int64_t out_stride;
};
TENFOLD_ISA_DECLARE_BF16(void moe_combine(const MoeTileRows& t, const MoeCombine& c))

}  // namespace tenfold
