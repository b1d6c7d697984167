// SPDX-License-Identifier: Apache-2.0
// moe_gate and moe_gate_linear (UpIT section 3, S6): which k of n experts a token goes to.
//
//   P = softmax(logits),  S = the k largest logits, the lower index first among equals,
//   weight_e = P_e / sum over S of P   (renormalize),   or P_e
//
// logits [T, n] -> weight float32 [T, k], index int32 [T, k], in falling order. A NaN counts as
// -inf in the choice and makes the weights of its row NaN; -inf is an expert that is masked.
// The CPU kernel transposes tiles of kGateTokens tokens, so that lanes hold tokens. k of 3 to 16
// come from sorting networks of keys, a logit's leading bits with the expert behind them; others,
// and logits that differ in the bits left out, from inserting expert after expert into a sorted
// list. Nothing of the logits' size is stored, equal logits keep their order. Logits are read once,
// weight and index written once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kGateTokens = 16;

struct GateParams {
  const void* logits;
  Dtype dtype;
  int64_t stride;  // elements between rows
  int64_t experts, k;
  bool renormalize;
  float* weight;
  int32_t* index;
};

// Experts of a row are distinct. d loss / d logits of it: on S weight_e (g_e - s) with s = sum over
// S of weight g where weights are renormalized; else P_e ([e in S] g_e - s) everywhere.
struct GateGradParams {
  const void* logits;
  Dtype dtype;
  int64_t stride;
  int64_t experts, k;
  bool renormalize;
  const float *grad, *weight;
  const int32_t* index;
  const float* also;  // float32 [T, n], added; may be null
  void* out;          // [T, n] of the dtype
};

// Floats of working memory.
constexpr int64_t gate_scratch(int64_t experts, int64_t k) {
  const int64_t padded = (experts + 7) / 8 * 8;
  return padded * (kGateTokens + 8) + 2 * k * kGateTokens + 4 * kGateTokens;
}

// Rows [begin, end).
TENFOLD_ISA_DECLARE(void gate_rows(const GateParams& p, int64_t begin, int64_t end, float* scratch))
TENFOLD_ISA_DECLARE(void gate_grad_rows(const GateGradParams& p, int64_t begin, int64_t end,
                                        float* scratch))

}  // namespace tenfold
