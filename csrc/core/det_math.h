// SPDX-License-Identifier: Apache-2.0
// A float32 logarithm that gives the same bits on every CPU ISA and on CUDA: each operation is
// rounded separately (no fused multiply-add anywhere; the CPU build uses -ffp-contract=off), so
// that a seed selects the same tokens everywhere. About 1.5 ulp; polynomial of Cephes' logf. The
// vector code in core/cpu runs the same template with vector operations.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace tenfold {

// Separately rounded scalar operations.
struct DetScalarOps {
  using F = float;
  TENFOLD_HD float set1(float x) { return x; }
#if defined(__CUDA_ARCH__)
  TENFOLD_HD float mul(float a, float b) { return __fmul_rn(a, b); }
  TENFOLD_HD float add(float a, float b) { return __fadd_rn(a, b); }
#else
  TENFOLD_HD float mul(float a, float b) { return a * b; }
  TENFOLD_HD float add(float a, float b) { return a + b; }
#endif
};

// log((1 + f) * 2^e) for f in [sqrt(1/2) - 1, sqrt(2) - 1].
template <class Ops>
TENFOLD_HD typename Ops::F det_log_tail(typename Ops::F f, typename Ops::F e) {
  constexpr float kPoly[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                              -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                              2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  constexpr float kLn2Low = -2.12194440e-4f, kLn2High = 0.693359375f;
  auto y = Ops::set1(kPoly[0]);
  for (int i = 1; i < 9; ++i) y = Ops::add(Ops::mul(y, f), Ops::set1(kPoly[i]));
  const auto z = Ops::mul(f, f);
  y = Ops::mul(Ops::mul(y, f), z);
  y = Ops::add(y, Ops::mul(e, Ops::set1(kLn2Low)));
  y = Ops::add(y, Ops::mul(z, Ops::set1(-0.5f)));
  return Ops::add(Ops::add(f, y), Ops::mul(e, Ops::set1(kLn2High)));
}

constexpr uint32_t kSqrtHalfBits = 0x3F3504F3u;  // sqrt(1/2), the split point of the mantissa

TENFOLD_HD float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

TENFOLD_HD uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Natural logarithm of a positive normal float.
TENFOLD_HD float det_log_normal(float x) {
  const uint32_t bits = float_to_bits(x);
  uint32_t mantissa = (bits & 0x007FFFFFu) | 0x3F000000u;  // [0.5, 1)
  int exponent = static_cast<int>(bits >> 23) - 126;
  if (mantissa < kSqrtHalfBits) {
    mantissa += 0x00800000u;  // times 2
    exponent -= 1;
  }
  const float f = DetScalarOps::add(bits_to_float(mantissa), -1.0f);
  return det_log_tail<DetScalarOps>(f, static_cast<float>(exponent));
}

// Natural logarithm of any float: 0 -> -inf, negative or NaN -> NaN, +inf -> +inf.
TENFOLD_HD float det_log(float x) {
  if (x == 0.0f) return bits_to_float(0xFF800000u);
  if (!(x > 0.0f)) return bits_to_float(0x7FC00000u);
  if (float_to_bits(x) == 0x7F800000u) return x;
  if (float_to_bits(x) < 0x00800000u)  // subnormal: scale by 2^24, subtract 24 ln 2
    return DetScalarOps::add(det_log_normal(DetScalarOps::mul(x, 16777216.0f)), -16.635532333f);
  return det_log_normal(x);
}

// Standard Gumbel noise of one Philox word: u = ((word >> 9) + 0.5) * 2^-23, always in (0, 1).
TENFOLD_HD float gumbel(uint32_t word) {
  const float u = DetScalarOps::mul(DetScalarOps::add(static_cast<float>(word >> 9), 0.5f),
                                    1.1920928955078125e-7f);
  return -det_log_normal(-det_log_normal(u));
}

// Order-preserving map of floats to unsigned integers: a < b  <=>  key(a) < key(b). NaN counts as
// -inf, and -0 as +0. 0 is below every key, so it can mark 'not a candidate'.
TENFOLD_HD uint32_t sortable_key(float x) {
  if (x != x) x = bits_to_float(0xFF800000u);
  const uint32_t bits = float_to_bits(x == 0.0f ? 0.0f : x);
  return bits ^ ((bits & 0x80000000u) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}

// The number of a key.
TENFOLD_HD float from_sortable_key(uint32_t key) {
  return bits_to_float(key ^ ((key & 0x80000000u) != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

}  // namespace tenfold
