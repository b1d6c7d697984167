// SPDX-License-Identifier: Apache-2.0
// The kernel of swiglu and gated_gelu, and its gradients: out = f(a) b with f(a) = a p(a),
//
//   silu       p = 1 / (1 + e^-a)
//   gelu_tanh  p = 1 / (1 + e^-v) = (1 + tanh(v / 2)) / 2, v = 2 sqrt(2 / pi) (a + 0.044715 a^3)
//   gelu       p = (1 + erf(a / sqrt(2))) / 2, the normal distribution
//
//   da = dout b (p + a p'),  db = dout f(a)
//
// Arithmetic is float32, each result is rounded once. Traffic: a, b (and dout) read once, out (da
// and db) written once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

enum class Gate : int { silu, gelu_tanh, gelu };

// v = a (kGeluSlope + kGeluCube a^2). Where a^2 is larger than kGeluFar, p is 0 or 1 to the last
// bit: a^2 is bounded there, so that p' is 0 and not 0 times infinity.
constexpr float kGeluSlope = 1.5957691216057308f, kGeluCube = 0.07135481282636783f;
constexpr float kGeluFar = 128.0f;
constexpr float kInverseSqrt2 = 0.7071067811865476f, kInverseSqrt2Pi = 0.3989422804014327f;

// n neighbours of one row.
struct GatedSpan {
  Dtype dtype;
  Gate gate;
  bool past_caches;
  const void *a, *b;
  void* out;
  int64_t n;
};
struct GatedGradSpan {
  Dtype dtype;
  Gate gate;
  bool past_caches;
  const void *dout, *a, *b;
  void *da, *db;  // or null
  int64_t n;
};

TENFOLD_ISA_DECLARE_BF16(void gated_act(const GatedSpan& s))
TENFOLD_ISA_DECLARE_BF16(void gated_act_grad(const GatedGradSpan& s))

}  // namespace tenfold
