// SPDX-License-Identifier: Apache-2.0
// 16-bit storage types to float and back: the same bits on host and device (payloads of NaN aside,
// for float16, which the device converts in one instruction; the inner loops of a decode need
// that).
#pragma once

#include <type_traits>

#include "core/det_math.h"
#include "core/launch.cuh"

namespace tenfold::cuda {

TENFOLD_HD float to_float(float x) {
  return x;
}

TENFOLD_HD float to_float(bf16_t x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}

TENFOLD_HD float to_float(fp16_t x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1Fu, mantissa = x.bits & 0x3FFu;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000u | (mantissa << 13));
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float f = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // * 2^-24, exact
  return bits_to_float(float_to_bits(f) | sign);
#endif
}

TENFOLD_HD void from_float(float x, float* out) {
  *out = x;
}

TENFOLD_HD void from_float(float x, bf16_t* out) {
  const uint32_t bits = float_to_bits(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  const uint32_t up = nan ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
  out->bits = static_cast<uint16_t>(up >> 16);
}

TENFOLD_HD void from_float(float x, fp16_t* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  uint32_t bits = float_to_bits(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7E00u);
  } else if (bits >= 0x47800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7C00u);
  } else if (bits < 0x38800000u) {  // subnormal half: adding 0.5 rounds at 2^-24, to nearest even
    const uint32_t sum = float_to_bits(bits_to_float(bits) + 0.5f);
    out->bits = static_cast<uint16_t>(sign | (sum - 0x3F000000u));
  } else {
    const uint32_t odd = (bits >> 13) & 1u;
    out->bits = static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xFFFu + odd) >> 13));
  }
#endif
}

// Two values rounded to 16 bits in one register, `low` in the low half.
template <class T>
__device__ inline uint32_t pack2(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16_t>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
#else
  T a, b;
  from_float(low, &a);
  from_float(high, &b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
#endif
}

// Two neighbours, in one store.
template <class T>
__device__ inline void store_two(T* to, float low, float high) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(low, high);
  } else {
    const uint64_t bits = static_cast<uint64_t>(float_to_bits(high)) << 32 | float_to_bits(low);
    *reinterpret_cast<uint64_t*>(to) = bits;
  }
}

// 2^x in one instruction: relative error 2^-22, results below 2^-126 are 0.
__device__ inline float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// An int32 or int64 index array of any stride, read as int64.
struct IntArray {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride = 1;

  TENFOLD_HD_MEMBER int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<const int32_t*>(data)[i * stride];
  }
  TENFOLD_HD_MEMBER bool given() const { return data != nullptr; }
};

}  // namespace tenfold::cuda
