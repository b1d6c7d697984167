// SPDX-License-Identifier: Apache-2.0
// masked_adamw_: one AdamW step over a list of tensors, on the trained elements only (mask.h).
//
//   p = p * f32(1 - lr wd)                 t: the step after its increment
//   m = fma(f32(1 - b1), g - m, m)         1 - b1 >= 0.5: fma(f32(1 - b1) - 1, g - m, g)
//   v = fma(f32(1 - b2) g, g, v f32(b2))
//   d = sqrt(v) / f32(sqrt(1 - b2^t)) + f32(eps)         amsgrad: of max(v) so far
//   p = p + (f32(-lr / (1 - b1^t)) m) / d
//
// with g = (maximize ? -g : g) / grad_scale * clip_coef. All of it in float32, every operation
// rounded once in this order, scalars computed in double and rounded once: the bits of
// torch.optim.AdamW(fused=True). p, m, v are rounded once when they are stored; p stochastically if
// asked for. A frozen element keeps the bits of p, m, v (and max); scope param_only updates m, v
// (and max) everywhere and p where trained.
//
//   p, g [n]        float32, bfloat16, float16; dense, the same strides; taken in storage order
//   m, v, max [n]   float32, bfloat16, or float16 with float16 parameters; or *compact*: only the
//                   trained elements, in storage order, found through the prefix of the mask
//   step            float32, 0-d; advances by 1 unless found_inf
//
// Traffic per trained element: p read and written, g read, m and v read and written; a mask adds
// its bits. Frozen rows and blocks move nothing; single frozen elements share sectors with trained
// ones.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"
#include "core/types.h"
#include "optim/mask.h"

namespace tenfold {

constexpr int64_t kPrefixBlock = 256;  // bits of a mask between two entries of its prefix

// What does not change from tensor to tensor.
struct AdamwOptions {
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize, amsgrad, stochastic, param_only;
  uint64_t seed;
};

// The numbers of one tensor's step.
struct AdamwScalars {
  float decay;       // 1 - lr wd
  float step;        // -lr / (1 - b1^t)
  float lerp;        // 1 - b1, or that - 1
  float beta2;       // b2
  float rest2;       // 1 - b2
  float correction;  // sqrt(1 - b2^t)
  float inverse;     // 1 / correction
  float eps;
  float divisor;  // of the gradient: grad_scale, negative if maximize
  float factor;   // of the gradient: clip_coef
  int32_t from_gradient;
  int32_t divides;  // 0: divisor is +-2^k and holds its reciprocal, which is exact
  uint32_t count;   // t
  int32_t skips;    // found_inf: nothing is written
};

// 1 - lr wd, each operation rounded: nvcc would contract them.
TENFOLD_HD double adamw_decay(double lr, double weight_decay) {
#if defined(__CUDA_ARCH__)
  return __dsub_rn(1.0, __dmul_rn(lr, weight_decay));
#else
  return 1.0 - lr * weight_decay;
#endif
}

TENFOLD_HD AdamwScalars adamw_scalars(const AdamwOptions& o, double t, float grad_scale,
                                      float clip_coef) {
  AdamwScalars s;
  s.decay = static_cast<float>(adamw_decay(o.lr, o.weight_decay));
  s.step = static_cast<float>(-o.lr / (1.0 - pow(o.beta1, t)));
  s.lerp = static_cast<float>(1.0 - o.beta1);
  s.from_gradient = !(s.lerp < 0.5f);
  if (s.from_gradient) s.lerp -= 1.0f;
  s.beta2 = static_cast<float>(o.beta2);
  s.rest2 = static_cast<float>(1.0 - o.beta2);
  s.correction = static_cast<float>(sqrt(1.0 - pow(o.beta2, t)));
  s.inverse = 1.0f / s.correction;
  s.eps = static_cast<float>(o.eps);
  s.divisor = o.maximize ? -grad_scale : grad_scale;
  int exponent;
  const float mantissa = frexpf(grad_scale, &exponent);
  s.divides = !(mantissa == 0.5f && exponent > -100 && exponent < 100);
  if (!s.divides) s.divisor = 1.0f / s.divisor;
  s.factor = clip_coef;
  s.count = static_cast<uint32_t>(static_cast<int64_t>(t));
  s.skips = 0;
  return s;
}

// The scalars as what the rule works on: floats, or vectors of one value. `Ops` are the operations:
// each rounded once, `fma_from(c, a, b)` = c - a b, `finite(q, x)` = x where q is finite, else q.
template <class Ops>
struct AdamwConstants {
  typename Ops::F decay, step, lerp, beta2, rest2, correction, inverse, eps;
  typename Ops::Flag from_gradient;
};

template <class Ops>
TENFOLD_HD AdamwConstants<Ops> adamw_constants(const AdamwScalars& s) {
  return {Ops::set1(s.decay),   Ops::set1(s.step),  Ops::set1(s.lerp),
          Ops::set1(s.beta2),   Ops::set1(s.rest2), Ops::set1(s.correction),
          Ops::set1(s.inverse), Ops::set1(s.eps),   Ops::flag(s.from_gradient != 0)};
}

// x / c without a division, for many x and one c: the product with the rounded reciprocal is off by
// an ulp or so, and its exact remainder mends that to the correctly rounded quotient (Markstein,
// 1990). Needs x = 0 or x >= 2^-75, as roots are, and 2^-40 <= c <= 1 (c = 0 and NaN work too).
template <class Ops, class F = typename Ops::F>
TENFOLD_HD F adamw_divide(F x, F c, F inverse) {
  const F q = Ops::mul(x, inverse);
  const F mended = Ops::fma(Ops::fma_from(x, q, c), inverse, q);
  return Ops::finite(q, mended);  // an infinite q is right, its remainder is NaN
}

template <class Ops, class F = typename Ops::F>
TENFOLD_HD void adamw_moments(const AdamwConstants<Ops>& c, F g, F* m, F* v) {
  *m = Ops::fma(c.lerp, Ops::sub(g, *m), Ops::choose(c.from_gradient, g, *m));
  *v = Ops::fma(Ops::mul(c.rest2, g), g, Ops::mul(*v, c.beta2));
}

// `v`: the second moment, or its maximum so far.
template <class Ops, class F = typename Ops::F>
TENFOLD_HD F adamw_param(const AdamwConstants<Ops>& c, F p, F m, F v) {
  const F d = Ops::add(adamw_divide<Ops>(Ops::sqrt(v), c.correction, c.inverse), c.eps);
  return Ops::add(Ops::mul(p, c.decay), Ops::div(Ops::mul(c.step, m), d));
}

// One tensor of the call, as the kernels of both backends see it.
struct AdamwTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  void* max_exp_avg_sq;  // null: no amsgrad
  float* step;
  const int32_t* prefix;  // null: dense states
  Mask mask;
  int64_t numel;
  int64_t state_numel;  // of compact states
  int64_t col_trained;  // compact col states: trained elements of a row
  Dtype dtype, state_dtype;
  uint32_t id;  // of the tensor, in the random numbers
};

// Where the states of element i stand; of a frozen one: those of the next trained element.
TENFOLD_HD int64_t adamw_state_position(const AdamwTensor& t, int64_t i) {
  if (t.prefix == nullptr) return i;
  const Mask& mask = t.mask;
  const int64_t unit = mask.kind == MaskKind::element ? i
                       : mask.kind == MaskKind::col   ? i % mask.inner
                                                      : i / mask.inner;
  const int64_t rank = mask_rank(mask.bits, t.prefix, unit, kPrefixBlock);
  if (mask.kind == MaskKind::element) return rank;
  if (mask.kind == MaskKind::col) return i / mask.inner * t.col_trained + rank;
  return rank * mask.inner + (mask_bit(mask.bits, unit) ? i % mask.inner : 0);
}

// The elements [begin, end) of a tensor; begin is a multiple of kAdamwGrain, end too or the numel.
constexpr int64_t kAdamwGrain = 1024;
TENFOLD_ISA_DECLARE_BF16(void masked_adamw_range(const AdamwTensor& t, const AdamwScalars& s,
                                                 const AdamwOptions& o, int64_t begin, int64_t end))

}  // namespace tenfold
