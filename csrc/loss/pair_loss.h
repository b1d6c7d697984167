// SPDX-License-Identifier: Apache-2.0
// pairwise_logsigmoid (Themis section 4; margin and center: TRL's RewardTrainer), of B pairs:
//
//   delta = r+ - r-,  x = delta - margin
//   loss  = mean(softplus(-x) + center (r+ + r-)^2)
//   d loss / d r+- = (-+ sigmoid(-x) + 2 center (r+ + r-)) / B
//
// Without a center its term is left out, also of infinite rewards.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"

namespace tenfold {

struct PairTerm {
  float loss, slope, level;  // slope: -sigmoid(-x); level: 2 center (r+ + r-)
};

TENFOLD_HD PairTerm pair_term(float pos, float neg, float margin, float center) {
  const float x = pos - neg - margin, sum = center != 0.0f ? pos + neg : 0.0f;
  const float e = expf(-fabsf(x)), tail = log1pf(e);
  return {(x < 0.0f ? tail - x : tail) + center * sum * sum, -(x < 0.0f ? 1.0f : e) / (1.0f + e),
          2.0f * center * sum};
}

// margin: or null. Sum of the terms; writes delta, and of_pos and of_neg unless they are null: the
// gradients of the mean.
TENFOLD_ISA_DECLARE(double pair_losses(const float* pos, const float* neg, const float* margin,
                                       float center, int64_t n, float* delta, float* of_pos,
                                       float* of_neg))
}  // namespace tenfold
