// SPDX-License-Identifier: Apache-2.0
// outer_dot (GPTfluence, sections 3.7 and 6): inner products of the gradients of a linear layer's
// weight. With J [T, V] the gradients at its output and X [T, D] its input, that gradient is J^T X,
// and of two examples
//
//   <J^T X, J2^T X2> = sum over t, s of <J[t], J2[s]> <X[t], X2[s]>
//
// J [N, T, V], X [N, T, D], J2 [M, S, V], X2 [M, S, D], float32, bfloat16 or float16, to float32
// scores [N, M], or [N] of pairs (i, i). Products are summed in float32.
//
// 2 T S (V + D) FLOPs a pair instead of 2 (T + S) V D, and nothing of the size V D, nor T S of more
// than a tile: a task takes the tokens of some examples of either side, cut into chunks of kDotRows
// and kDotCols, makes both products of a chunk strip by strip of V and D from packed panels, and
// sums their elementwise product pair by pair. Chunks begin with an example, so a score does not
// depend on what else is in the task.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

// Vectors of the tokens of some examples.
struct TokenRows {
  const void* data;
  int64_t example, token;  // elements between examples, and between tokens
};

struct OuterDot {
  Dtype dtype;
  TokenRows j, x, j2, x2;
  int64_t n, t, m, s, v, d;
  bool paired;
  bool direct;  // too few products to pack anything
  float* out;
};

// Examples [i, i + rows) with examples [k, k + cols). If paired, one with one.
struct DotTask {
  int64_t i, rows, k, cols;
};

constexpr int64_t kDotRows = 576, kDotCols = 384, kDotPitch = kDotCols + 16;
constexpr int64_t kDotStrip = 256;  // words of a packed row
constexpr int64_t kDotPad = 16;     // floats: a power of two would put panels into the same sets
constexpr int64_t kDotPanels = kDotRows * kDotStrip + kDotRows / 8 * kDotPad;
constexpr int64_t kDotLanes = kDotCols * kDotStrip + kDotCols / 12 * kDotPad;
constexpr int64_t kDotScores = kDotRows * kDotCols;  // doubles
// Floats of a task's memory.
constexpr int64_t kDotRoom =
    kDotPanels + kDotLanes + 16 * kDotStrip + 2 * kDotRows * kDotPitch + 2 * kDotScores;

TENFOLD_ISA_DECLARE_AMX(void outer_dot_task(const OuterDot& p, const DotTask& task, float* room))

}  // namespace tenfold
