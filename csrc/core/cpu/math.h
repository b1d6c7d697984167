// SPDX-License-Identifier: Apache-2.0
// Vector functions made of vec.h: exp2, exp, tanh, sigmoid, the normal distribution, the bit-exact
// logarithm and Gumbel noise of det_math.h, Philox.
#pragma once

#include "core/cpu/vec.h"
#include "core/det_math.h"
#include "core/philox.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 2^r for r in [-1/2, 1/2].
inline VF exp2_of_rest(VF r) {
  VF p = set1(1.5353362e-4f);
  p = fma(p, r, set1(1.3398874e-3f));
  p = fma(p, r, set1(9.6184373e-3f));
  p = fma(p, r, set1(5.5503324e-2f));
  p = fma(p, r, set1(2.4022648e-1f));
  p = fma(p, r, set1(6.9314720e-1f));
  return fma(p, r, set1(1.0f));
}

// 2^(n + r) for whole n in [-151, 128) and r in [-1/2, 1/2].
inline VF exp2_of_parts(VF n, VF r) {
  return ldexp(exp2_of_rest(r), n);
}

// 2^x for x < 128, about 1 ulp; -inf and everything below -150 give 0; NaN stays NaN.
inline VF exp2(VF x) {
  x = vmax(set1(-151.0f), x);  // the NaN operand is the second, so it survives
  const VF n = rint(x);
  return exp2_of_parts(n, x - n);
}

constexpr float kExpFloor = -104.66f;  // e^x rounds to 0

// e^x, likewise, for kExpFloor <= x < 88. exp2(x log2 e) would round the product: an error that
// grows with x.
inline VF exp_above_floor(VF x) {
  const VF log2e = set1(kLog2e);
  const VF n = rint(x * log2e);
  return exp2_of_parts(n, fma(x, log2e, set1(0.0f) - n));
}

inline VF exp(VF x) {
  return exp_above_floor(vmax(set1(kExpFloor), x));
}

// 2^(x unit), likewise and without rounding the product, for x unit < 128 and `floor` =
// exp2_floor(unit), which must be finite.
inline VF exp2_scaled(VF x, VF unit, VF floor) {
  x = vmax(floor, x);
  const VF n = rint(x * unit);
  return exp2_of_parts(n, fma(x, unit, set1(0.0f) - n));
}

inline float exp2_floor(float unit) {
  return -151.0f / unit;
}

// tanh to about an ulp; NaN stays NaN. Near 0, where the quotient cancels, it is an odd polynomial
// (fitted to a relative error of 6e-9 up to 0.64).
inline VF tanh(VF x) {
  const VF magnitude = vmax(x, set1(0.0f) - x);
  const VF e = exp2(magnitude * set1(-2.0f * kLog2e)), one = set1(1.0f);
  VF far = one - (e + e) / (one + e);  // what is rounded before the difference is small
  far = select(lt(x, set1(0.0f)), set1(0.0f) - far, far);
  const VF z = x * x;
  VF p = set1(-0.00560386f);
  p = fma(p, z, set1(0.02055167f));
  p = fma(p, z, set1(-0.05371409f));
  p = fma(p, z, set1(0.13331153f));
  p = fma(p, z, set1(-0.33333272f));
  return select(lt(magnitude, set1(0.625f)), fma(x * z, p, x), far);
}

// 1 / (1 + e^-x), from the exponential that cannot overflow, and its derivative; relatively exact
// on both sides, where 1 - value would not be.
struct Logistic {
  VF value, slope;
};
inline Logistic logistic(VF x) {
  const VF e = exp(from_bits(bits(x) | seti(0x80000000u))), one = set1(1.0f);
  const VF inv = inverse(one + e), small = e * inv;
  return {select(lt(x, set1(0.0f)), small, inv), small * inv};
}

inline VF sigmoid(VF x) {
  return logistic(x).value;
}

// The normal distribution below x, relatively exact on both sides, and e^(-x^2 / 2).
struct Normal {
  VF below, bell;
};

// What lies beyond z = |x| is t p(t) e^(-z^2 / 2) with t = 1 / (1 + 0.35 z): p is fitted to a
// relative error of 3e-8. Beyond 15 it is 0.
inline Normal normal(VF x) {
  const VF zero = set1(0.0f), one = set1(1.0f), half = set1(-0.5f);
  const VF z = vmin(set1(15.0f), vmax(zero - x, x));  // the NaN operand is the second
  const VF square = z * z, rest = fma(z, z, zero - square);
  VF bell = exp(square * half);
  bell = fma(bell, rest * half, bell);
  const VF t = inverse(fma(z, set1(0.35f), one));
  VF p = set1(-0.029163146f);
  p = fma(p, t, set1(0.14405736f));
  p = fma(p, t, set1(-0.25589547f));
  p = fma(p, t, set1(0.15938634f));
  p = fma(p, t, set1(-0.023259763f));
  p = fma(p, t, set1(0.10557325f));
  p = fma(p, t, set1(0.11981585f));
  p = fma(p, t, set1(0.13986430f));
  p = fma(p, t, set1(0.13962126f));
  const VF beyond = p * t * bell;
  return {select(lt(x, zero), beyond, one - beyond), bell};
}

// x r(x^2) with r a quotient of two polynomials of so many coefficients, highest first.
template <int kTop, int kBottom>
inline VF odd_quotient(VF x, const float (&top)[kTop], const float (&bottom)[kBottom]) {
  const VF square = x * x;
  VF p = set1(top[0]), q = set1(bottom[0]);
  for (int i = 1; i < kTop; ++i) p = fma(p, square, set1(top[i]));
  for (int i = 1; i < kBottom; ++i) q = fma(q, square, set1(bottom[i]));
  return x * p * inverse(q);
}

// The normal distribution below x to an absolute error of 2e-7, which is what float32 leaves of 1 +
// erf: less than half the operations of normal(). Exactly 0 below -5.6. NaN stays NaN.
inline VF normal_below(VF x) {
  constexpr float kTop[] = {2.214534862e-8f, 6.356522762e-6f, 1.738499632e-4f,
                            4.707254712e-3f, 3.437603541e-2f, 3.989422216e-1f};
  constexpr float kBottom[] = {1.180212340e-6f, 7.510165626e-5f, 1.912973862e-3f,
                               2.894004590e-2f, 2.528336555e-1f, 1.0f};
  constexpr float kEnd = 5.6f;
  const VF z = vmin(set1(kEnd), vmax(set1(-kEnd), x));
  return select(lt(x, set1(-kEnd)), set1(0.0f), set1(0.5f) + odd_quotient(z, kTop, kBottom));
}

// The derivative of x normal_below(x), likewise: exactly 0 below -6.1.
inline VF gelu_slope(VF x) {
  constexpr float kTop[] = {1.782568878e-8f, 1.019602346e-6f,  3.412106971e-5f, 2.388212369e-4f,
                            1.378041049e-2f, -2.037619764e-2f, 7.978845233e-1f};
  constexpr float kBottom[] = {1.341119091e-9f, 3.661635336e-7f, 1.078439446e-5f, 2.544523060e-4f,
                               4.074639316e-3f, 4.487088802e-2f, 3.077950894e-1f, 1.0f};
  constexpr float kEnd = 6.1f;
  const VF z = vmin(set1(kEnd), vmax(set1(-kEnd), x));
  return select(lt(x, set1(-kEnd)), set1(0.0f), set1(0.5f) + odd_quotient(z, kTop, kBottom));
}

struct DetVecOps {
  using F = VF;
  static inline VF set1(float x) { return TENFOLD_ISA::set1(x); }
  static inline VF mul(VF a, VF b) { return a * b; }
  static inline VF add(VF a, VF b) { return a + b; }
};

// Lane-wise det_log_normal of det_math.h, bit for bit.
inline VF det_log_normal(VF x) {
  const VI b = bits(x);
  VI mantissa = (b & seti(0x007FFFFFu)) | seti(0x3F000000u);
  VI exponent = shr<23>(b) - seti(126);
  const VM low = lt(mantissa, seti(kSqrtHalfBits));
  mantissa = select(low, mantissa + seti(0x00800000u), mantissa);
  exponent = select(low, exponent - seti(1), exponent);
  return det_log_tail<DetVecOps>(from_bits(mantissa) + set1(-1.0f), to_float(exponent));
}

// Lane-wise det_log: 0 -> -inf, negative or NaN -> NaN, +inf -> +inf, subnormals scaled.
inline VF det_log(VF x) {
  const VM subnormal = lt(x, set1(1.17549435e-38f));
  const VF scaled = select(subnormal, x * set1(16777216.0f), x);
  VF y = det_log_normal(scaled);
  y = select(subnormal, y + set1(-16.635532333f), y);
  y = select(eq(x, set1(0.0f)), from_bits(seti(0xFF800000u)), y);
  y = select(eq(x, from_bits(seti(0x7F800000u))), x, y);
  const VF nan = from_bits(seti(0x7FC00000u));
  return select(unordered(x), nan, select(lt(x, set1(0.0f)), nan, y));
}

// First Philox word of counters (c0, c1, c2, c3), lane-wise in c2. The words that are the same in
// all lanes during the first rounds are computed once.
inline VI philox_word0(uint32_t c0, uint32_t c1, VI c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  VI hi0, lo0, hi1, lo1;
  mulhilo(c2, kPhiloxMul1, &hi1, &lo1);
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxMul0) * c0;
  VI x0 = hi1 ^ seti(c1 ^ k0), x1 = lo1;
  const uint32_t s2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, s3 = static_cast<uint32_t>(p0);
  k0 += kPhiloxWeyl0;
  k1 += kPhiloxWeyl1;
  mulhilo(x0, kPhiloxMul0, &hi0, &lo0);
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxMul1) * s2;
  x0 = x1 ^ seti(static_cast<uint32_t>(p1 >> 32) ^ k0);
  x1 = seti(static_cast<uint32_t>(p1));
  VI x2 = hi0 ^ seti(s3 ^ k1), x3 = lo0;
  for (int round = 2; round < 10; ++round) {
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
    mulhilo(x0, kPhiloxMul0, &hi0, &lo0);
    mulhilo(x2, kPhiloxMul1, &hi1, &lo1);
    x0 = hi1 ^ x1 ^ seti(k0);
    x1 = lo1;
    x2 = hi0 ^ x3 ^ seti(k1);
    x3 = lo0;
  }
  return x0;
}

// All four words of counters x, in place.
inline void philox_rounds(VI (&x)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    VI hi0, lo0, hi1, lo1;
    mulhilo(x[0], kPhiloxMul0, &hi0, &lo0);
    mulhilo(x[2], kPhiloxMul1, &hi1, &lo1);
    x[0] = hi1 ^ x[1] ^ seti(k0);
    x[1] = lo1;
    x[2] = hi0 ^ x[3] ^ seti(k1);
    x[3] = lo0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
}

// Counters dealt to lanes as store_by_four() wants them.
inline VI counter_lanes() {
  uint32_t lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<uint32_t>(i % 4 * (kWidth / 4) + i / 4);
  return load(lanes);
}

inline VF gumbel(VI word) {
  const VF u = (to_float(shr<9>(word)) + set1(0.5f)) * set1(1.1920928955078125e-7f);
  const VF zero = set1(0.0f);
  return zero - det_log_normal(zero - det_log_normal(u));
}

inline VI sortable_key(VF x) {
  x = select(unordered(x), from_bits(seti(0xFF800000u)), x);
  x = select(eq(x, set1(0.0f)), set1(0.0f), x);
  const VI b = bits(x);
  const VI sign = shr_signed<31>(b);  // all ones if negative
  return b ^ (sign | seti(0x80000000u));
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
