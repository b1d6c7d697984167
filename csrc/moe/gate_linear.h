// SPDX-License-Identifier: Apache-2.0
// The router's products of moe_gate_linear: logits = x w^T [T, n] in float32, and in the backward
// grad_x = g w and grad_w = g^T x from the gradient g of the logits, float32 [T, n].
//
// n is small, so x is what there is to read: once, in tiles of kRouterTokens tokens. Vectors lie
// along d, where both operands are contiguous, so neither is transposed: blocks of 3 tokens times 8
// experts of sums, a part of d at a time, so that those 8 rows of w stay in the first cache. The
// two products of the backward broadcast g to rows of w or x; sums over tokens are cut into strips
// (kOuterStrip) whose sums are added afterwards. Nothing depends on T or on threads.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kRouterTokens = 48;
constexpr int64_t kRouterPart = 4096;  // bytes of a row at a time
constexpr int64_t kOuterCols = 256, kOuterStrip = 128;

struct RouterParams {
  const void *x, *w;
  Dtype x_dtype, w_dtype;      // w: that of x, or float32
  int64_t x_stride, w_stride;  // elements between rows
  int64_t dim, experts;
  float* logits;
};

// out[r][c] = sum over i < depth of a[r a_row + i a_step] b[i][c]
struct OuterParams {
  const float* a;
  int64_t a_row, a_step, rows, depth;
  const void* b;
  Dtype dtype;
  int64_t b_stride;
  float* out;
  int64_t pitch;
};

TENFOLD_ISA_DECLARE_BF16(void router_logits(const RouterParams& p, int64_t begin, int64_t end))
// Columns [col, col + cols) of b, to the first columns of out.
TENFOLD_ISA_DECLARE_BF16(void router_outer(const OuterParams& p, int64_t col, int64_t cols))
// Rounds n numbers, or copies them.
TENFOLD_ISA_DECLARE_BF16(void router_round(const float* from, int64_t n, Dtype dtype, void* to))

}  // namespace tenfold
