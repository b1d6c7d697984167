// SPDX-License-Identifier: Apache-2.0
// Group normalisation with one group, exact GELU, residual: of a sample x [C, L], n = C L,
//
//   h = (x - m) r, m and 1 / r^2 = v + eps: mean and variance of all n;  u = w_c h + b_c
//   y = gelu(u) + residual, gelu(u) = u P(u), P the normal distribution, p its density
//
//   g = dy (P + u p);  db_c = sum g, dw_c = sum g h, over samples and positions
//   dx = r (w_c g - mean(w_c g) - h mean(w_c g h)), means over the sample
//
// Statistics: blocks of kGn1Block neighbours, each about its own mean in float32; (count, mean,
// sum of squares about it) of blocks are joined in double, in their order. Traffic: forward 2 reads
// of x, one of the residual, one write; backward 2 reads of x and dy, one write.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kGn1Block = 4096;

struct Moments {
  double count, mean, squares;  // squares: of the differences to the mean
};

// Chan, Golub and LeVeque.
TENFOLD_HD Moments joined(const Moments& a, const Moments& b) {
  if (b.count == 0.0) return a;
  if (a.count == 0.0) return b;
  const double n = a.count + b.count, d = b.mean - a.mean;
  return {n, a.mean + d * (b.count / n), a.squares + b.squares + d * d * (a.count * b.count / n)};
}

// 1 / sqrt(variance + eps); of a constant sample and eps = 0 infinite, as torch's.
TENFOLD_HD double gn1_rstd(const Moments& m, double eps) {
  return 1.0 / std::sqrt(m.squares / m.count + eps);
}

struct Gn1Sums {
  double g, gh;
};

// Neighbours of one channel of one sample: h = (x - center) rstd + rest, where the mean of values
// far from 0 has more digits than a float: rest is what center lacks.
struct Gn1Span {
  Dtype dtype;
  bool past_caches;
  float center, rstd, rest, weight, bias;
  const void *x, *residual;  // residual: or null
  void* y;
  int64_t n;
};
// dx = rstd (weight g - mean_g - h mean_gh)
struct Gn1GradSpan {
  Dtype dtype;
  bool past_caches;
  float center, rstd, rest, weight, bias, mean_g, mean_gh;
  const void *dy, *x;
  void* dx;
  int64_t n;
};

TENFOLD_ISA_DECLARE_BF16(Moments gn1_moments(Dtype dtype, const void* x, int64_t n))
TENFOLD_ISA_DECLARE_BF16(void gn1_gelu(const Gn1Span& s))
TENFOLD_ISA_DECLARE_BF16(Gn1Sums gn1_grad_sums(const Gn1GradSpan& s))
TENFOLD_ISA_DECLARE_BF16(void gn1_gelu_grad(const Gn1GradSpan& s))
// Parameters as floats, and gradients from them.
TENFOLD_ISA_DECLARE_BF16(void gn1_widen(Dtype dtype, const void* from, int64_t n, float* to))
TENFOLD_ISA_DECLARE_BF16(void gn1_narrow(Dtype dtype, const float* from, int64_t n, void* to))

}  // namespace tenfold
