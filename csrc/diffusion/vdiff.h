// SPDX-License-Identifier: Apache-2.0
// Variance preserving diffusion with velocities (ERNIE-Music sections 3.1 and 3.5), the scalar core
// of both backends. With a = cos(pi t / 2), s = sin(pi t / 2), per sample of n elements:
//
//   vdiff_noise  z = a x0 + s e, v = a e - s x0; e given, or drawn (below) and never stored
//   vdiff_loss   mean (w - (a e - s x0))^2; gradient 2 g / n (w - (a e - s x0))
//   vdiff_step   w = w_u + g (w_c - w_u), x = clip(a z - s w), z' = kx x + kz z + kw w + ke e
//
// Traffic: each input read once, each output written once. Coefficients are made in double, the
// arithmetic of elements is float32 (float64 tensors: double).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/det_math.h"
#include "core/macros.h"
#include "core/philox.h"
#include "core/types.h"

namespace tenfold {

// Numbers for each sample, as device code reads them too.
struct PerSample {
  const void* data = nullptr;
  bool wide = false;
  int64_t step = 0;  // 0: one for all

  TENFOLD_HD_MEMBER double operator[](int64_t i) const {
    return wide ? static_cast<const double*>(data)[i * step]
                : static_cast<double>(static_cast<const float*>(data)[i * step]);
  }
};

struct VdiffAngle {
  double a, s;
};

// cos and sin of pi x / 2 for x in [0, 1/2].
TENFOLD_HD VdiffAngle vdiff_small_angle(double x) {
#if defined(__CUDA_ARCH__)
  VdiffAngle r;
  sincospi(0.5 * x, &r.s, &r.a);
  return r;
#else
  constexpr double kHalfPi = 1.57079632679489661923;
  return {std::cos(kHalfPi * x), std::sin(kHalfPi * x)};
#endif
}

// Exactly 0 and 1 at both ends; NaN where t is not in [0, 1].
TENFOLD_HD VdiffAngle vdiff_angle(double t) {
  if (!(t >= 0.0 && t <= 1.0)) return {NAN, NAN};
  if (t <= 0.5) return vdiff_small_angle(t);
  const VdiffAngle r = vdiff_small_angle(1.0 - t);
  return {r.s, r.a};
}

// sin(pi x / 2) for x in [0, 2].
TENFOLD_HD double vdiff_sine(double x) {
  return vdiff_angle(x <= 1.0 ? x : 2.0 - x).s;
}

struct StepOptions {
  double eta, clip;
  bool clips, rederives, plus_plus;  // rederives: the noise follows from the clipped x
};

// What a sample's step multiplies by. Without clipping and CFG++ kx is 0: x is only given back.
struct StepRule {
  double a, s, kx, kz, kw, ke;
};

// sig^2 = eta^2 (s_u / s_t)^2 (1 - a_t^2 / a_u^2), where 1 - a_t^2 / a_u^2 =
// sin(pi (t - u) / 2) sin(pi (t + u) / 2) / a_u^2: exactly 0 where u = t, never below.
TENFOLD_HD StepRule step_rule(double t, double u, const StepOptions& o) {
  const VdiffAngle from = vdiff_angle(t), to = vdiff_angle(u);
  if (!(u <= t)) return {NAN, NAN, NAN, NAN, NAN, NAN};
  double sig = 0.0;
  if (o.eta > 0.0 && u < t && to.s > 0.0) {
    const double ahead = vdiff_sine(t - u) * vdiff_sine(t + u);
    sig = o.eta * to.s * std::sqrt(ahead) / (from.s * to.a);
    if (sig > to.s) sig = to.s;
  }
  const double along = std::sqrt((to.s - sig) * (to.s + sig));
  StepRule r{from.a, from.s, 0.0, 0.0, 0.0, sig};
  if (o.clips && o.rederives && from.s > 0.0) {
    r.kx = to.a - along * from.a / from.s;
    r.kz = along / from.s;
  } else if (o.clips || o.plus_plus) {
    r.kx = to.a, r.kz = along * from.s, r.kw = along * from.a;
  } else {
    r.kz = to.a * from.a + along * from.s;
    r.kw = along * from.a - to.a * from.s;
  }
  return r;
}

// -- noise ----------------------------------------------------------------------------------------
// Position p of a stream takes number p % 4 of the Philox counter (p / 4, offset). Two words make
// two numbers by Box and Muller: sqrt(-2 log u) times cosine and sine of (pi / 2) g, |g| <= 1/2,
// which two further bits swap and negate: all angles are as likely. Every operation is rounded
// separately or fused everywhere: the same bits on every CPU and on CUDA.

// Taylor's, of cos and sin of (pi / 2) g by g^2.
constexpr float kCos8 = 9.1926027483e-4f, kCos6 = -2.0863480763e-2f, kCos4 = 2.5366950790e-1f,
                kCos2 = -1.2337005501f;
constexpr float kSin9 = 1.6044118479e-4f, kSin7 = -4.6817541353e-3f, kSin5 = 7.9692626247e-2f,
                kSin3 = -6.4596409751e-1f, kSin1 = 1.5707963268f;

struct TwoNormals {
  float x, y;
};

TENFOLD_HD float fused_once(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

TENFOLD_HD float root_once(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

TENFOLD_HD TwoNormals normals_of(uint32_t first, uint32_t second) {
  using D = DetScalarOps;
  const auto high = static_cast<float>(first >> 16), low = static_cast<float>(first & 0xFFFFu);
  const float u =
      D::add(D::mul(high, 1.52587890625e-5f), D::mul(D::add(low, 0.5f), 2.3283064365386963e-10f));
  const float root = root_once(D::mul(det_log_normal(u), -2.0f));
  const float radius = bits_to_float(float_to_bits(root) ^ (second & 0x80000000u));
  const float g =
      D::mul(static_cast<float>(static_cast<int32_t>(second << 2)), 2.3283064365386963e-10f);
  const float y = D::mul(g, g);
  float c = fused_once(kCos8, y, kCos6);
  c = fused_once(fused_once(fused_once(c, y, kCos4), y, kCos2), y, 1.0f);
  float s = fused_once(fused_once(kSin9, y, kSin7), y, kSin5);
  s = D::mul(fused_once(fused_once(s, y, kSin3), y, kSin1), g);
  const bool swap = (second & 0x40000000u) != 0;
  return {D::mul(radius, swap ? s : c), D::mul(radius, swap ? c : s)};
}

// The stream of a call.
struct NoiseStream {
  uint64_t seed, offset;
};

// Numbers of positions 4 i .. 4 i + 3.
TENFOLD_HD void four_normals(const NoiseStream& stream, uint64_t i, float (&out)[4]) {
  const Philox4 w = philox4x32_10(
      static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32),
      static_cast<uint32_t>(stream.offset), static_cast<uint32_t>(stream.offset >> 32),
      static_cast<uint32_t>(stream.seed), static_cast<uint32_t>(stream.seed >> 32));
  const TwoNormals a = normals_of(w.word[0], w.word[1]), b = normals_of(w.word[2], w.word[3]);
  out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y;
}

// -- CPU: neighbours of one sample ----------------------------------------------------------------

struct NoiseSpan {
  Dtype dtype;
  bool past_caches;
  float a, s;
  const void *x0, *noise;  // noise null: drawn
  void *z, *v;             // or null
  int64_t n;
  NoiseStream stream;
  int64_t position;  // of the first element
};

// The velocity may have 16 bits where x0 and noise are float32.
struct LossSpan {
  Dtype dtype, v_dtype;
  bool past_caches;
  float a, s;
  const void *v_hat, *x0, *noise;
  void* grad;    // of the dtype of v_hat; null: only the sum
  float factor;  // of the gradient
  int64_t n;
};

struct StepSpan {
  Dtype dtype, v_dtype;
  bool past_caches, general, clips, plus_plus;  // general: kx is not 0
  float a, s, kx, kz, kw, ke, guidance, clip;
  const void *z, *v, *v_uncond, *noise;  // v_uncond, noise: or null
  void *z_next, *x0_hat;                 // x0_hat: or null
  int64_t n;
};

TENFOLD_ISA_DECLARE_BF16(void vdiff_noise(const NoiseSpan& s))
// The sum of squares, which is 0 where a gradient is made.
TENFOLD_ISA_DECLARE_BF16(double vdiff_loss(const LossSpan& s))
TENFOLD_ISA_DECLARE_BF16(void vdiff_step(const StepSpan& s))

}  // namespace tenfold
