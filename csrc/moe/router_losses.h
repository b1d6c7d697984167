// SPDX-License-Identifier: Apache-2.0
// Losses of a router.
//
// load_balance_loss (UpIT section 3, S6) of logits [T, n] over the tokens that count:
//
//   L = n sum_e F_e mean_t P_te,   P = softmax(logits),   F_e = counts_e / (T k) or counts_e / T
//     = mean_t s_t  with  s_t = sum_e n F_e P_te,         d L / d logits_te = P_te (n F_e - s_t) /
//     T
//
// One pass over the logits each way, in transposed tiles; F carries no gradient.
//
// router_seed_loss (S4) of hidden states h [L, T, d] and one vector per layer r [L, d]: with z = h
// r,
//
//   mean over layers and tokens that count of  t softplus(-z) + (1 - t) softplus(z),   t = 1
//   slope = (sigmoid(z) - t) / N,   d / d r = sum of slope h,   d / d h = slope r
//
// h is read once: groups of 8 tokens, while they are in the cache, are multiplied by r, and added
// to the gradient of r. Parts of kSeedChunk tokens, and of kBalanceChunk, are summed in order: no
// result depends on the number of threads.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kBalanceChunk = 1024, kSeedChunk = 32, kSeedGroup = 8;

struct BalanceParams {
  const void* logits;
  Dtype dtype;
  int64_t stride, experts;
  const float* share;   // n F_e
  const uint8_t* mask;  // [T]; null: all tokens count
};

TENFOLD_HD double softplus(double x) {
  return (x > 0.0 ? x : 0.0) + std::log1p(std::exp(x > 0.0 ? -x : x));
}

struct SeedTerm {
  double loss, slope;
};

// An infinite z is not multiplied by 0.
TENFOLD_HD SeedTerm seed_term(double z, double target) {
  SeedTerm t{};
  if (target != 0.0) t.loss += target * softplus(-z);
  if (target != 1.0) t.loss += (1.0 - target) * softplus(z);
  const double e = std::exp(z > 0.0 ? -z : z);
  t.slope = (z > 0.0 ? 1.0 : e) / (1.0 + e) - target;
  return t;
}

// Sum of s_t over the tokens of [begin, end) that count; scratch as for gate_rows with k = 0.
TENFOLD_ISA_DECLARE_BF16(double balance_sum(const BalanceParams& p, int64_t begin, int64_t end,
                                            float* scratch))
// out [T, n] = by P_te (n F_e - s_t); zeros for the other tokens.
TENFOLD_ISA_DECLARE_BF16(void balance_grad(const BalanceParams& p, float by, int64_t begin,
                                           int64_t end, void* out, float* scratch))
// z[i] = <rows[i], r> for up to kSeedGroup rows.
TENFOLD_ISA_DECLARE_BF16(void seed_dots(const void* const* rows, int64_t count, Dtype dtype,
                                        int64_t d, const float* r, float* z))
// part += sum of slope[i] rows[i]
TENFOLD_ISA_DECLARE_BF16(void seed_add(const void* const* rows, int64_t count, Dtype dtype,
                                       int64_t d, const float* slope, float* part))
// out = by r
TENFOLD_ISA_DECLARE_BF16(void seed_scale(const float* r, float by, int64_t d, Dtype dtype,
                                         void* out))
TENFOLD_ISA_DECLARE_BF16(void seed_widen(const void* r, Dtype dtype, int64_t d, float* out))

}  // namespace tenfold
