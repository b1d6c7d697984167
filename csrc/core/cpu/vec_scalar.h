// SPDX-License-Identifier: Apache-2.0
// Baseline CPUs: 4 lanes as the compiler's own vectors (SSE2, NEON or what there is), loops where
// those have no operation. As loops throughout they took the compiler three times as long. See
// vec.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kWidth = 4;

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct VF {
  Float4 v;
};
struct VI {
  Word4 v;
};
struct VM {
  Int4 v;  // -1 or 0
};

#define TENFOLD_LANES for (int i = 0; i < 4; ++i)

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1Fu, mantissa = h & 0x3FFu;
  uint32_t x;
  if (exponent == 31) {
    x = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0) {
    x = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // subnormal or zero: mantissa * 2^-24 is exact in float32
    const float f = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    memcpy(&x, &f, 4);
    x |= sign;
  }
  float f;
  memcpy(&f, &x, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  const auto sign = static_cast<uint16_t>((x >> 16) & 0x8000u);
  x &= 0x7FFFFFFFu;
  if (x > 0x7F800000u) return sign | 0x7E00u | ((x >> 13) & 0x3FFu);
  if (x >= 0x47800000u) return sign | 0x7C00u;  // 65536 and more
  if (x < 0x38800000u) {                        // below the smallest normal half, 2^-14
    float a, magic = 0.5f;                      // adding 0.5 rounds at 2^-24, to nearest even
    memcpy(&a, &x, 4);
    a += magic;
    memcpy(&x, &a, 4);
    return sign | static_cast<uint16_t>(x - 0x3F000000u);
  }
  const uint32_t odd = (x >> 13) & 1u;
  return sign | static_cast<uint16_t>((x - 0x38000000u + 0xFFFu + odd) >> 13);
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t x = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &x, 4);
  return f;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  if ((x & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((x | 0x400000u) >> 16);
  return static_cast<uint16_t>((x + 0x7FFFu + ((x >> 16) & 1u)) >> 16);
}

inline VF set1(float x) {
  return {Float4{x, x, x, x}};
}
inline VI seti(uint32_t x) {
  return {Word4{x, x, x, x}};
}
inline VI iota() {
  return {Word4{0, 1, 2, 3}};
}

inline float element(const float* p) {
  return *p;
}
inline float element(const bf16_t* p) {
  return bf16_to_float(p->bits);
}
inline float element(const fp16_t* p) {
  return half_to_float(p->bits);
}
inline void put(float* p, float x) {
  *p = x;
}
inline void put(bf16_t* p, float x) {
  p->bits = float_to_bf16(x);
}
inline void put(fp16_t* p, float x) {
  p->bits = float_to_half(x);
}

template <class T>
inline VF load_n(const T* p, int n) {
  VF r = set1(0.0f);
  TENFOLD_LANES if (i < n) r.v[i] = element(p + i);
  return r;
}
template <class T>
inline VF load(const T* p) {
  return {Float4{element(p), element(p + 1), element(p + 2), element(p + 3)}};
}
inline VF load(const float* p) {
  VF r;
  memcpy(&r, p, sizeof r);
  return r;
}
template <class T>
inline void store_n(T* p, VF a, int n) {
  TENFOLD_LANES if (i < n) put(p + i, a.v[i]);
}
template <class T>
inline void store(T* p, VF a) {
  TENFOLD_LANES put(p + i, a.v[i]);
}
inline void store(float* p, VF a) {
  memcpy(p, &a, sizeof a);
}
// 2 kWidth neighbours as the even and the odd ones of them.
inline void load_pair(const bf16_t* p, VF* even, VF* odd) {
  TENFOLD_LANES {
    even->v[i] = element(p + 2 * i);
    odd->v[i] = element(p + 2 * i + 1);
  }
}
inline void store_pair(bf16_t* p, VF even, VF odd) {
  TENFOLD_LANES {
    put(p + 2 * i, even.v[i]);
    put(p + 2 * i + 1, odd.v[i]);
  }
}
template <class T>
inline void store_quick(T* p, VF a) {
  store(p, a);
}
inline void stream(float* p, VF a) {
  store(p, a);
}
inline void stream_fence() {}
inline VI load(const uint32_t* p) {
  VI r;
  memcpy(&r, p, sizeof r);
  return r;
}
inline VI load_n(const uint32_t* p, int n) {
  VI r = seti(0);
  TENFOLD_LANES if (i < n) r.v[i] = p[i];
  return r;
}
inline VI load_bytes(const uint8_t* p) {
  return {Word4{p[0], p[1], p[2], p[3]}};
}
// The lowest byte of every lane.
inline void store_low_bytes(uint8_t* p, VI a) {
  TENFOLD_LANES p[i] = static_cast<uint8_t>(a.v[i]);
}
// at: signed.
inline VF gather(const float* p, VI at) {
  VF r;
  TENFOLD_LANES r.v[i] = p[static_cast<int32_t>(at.v[i])];
  return r;
}
// p[i] of 32 floats, i < 32.
inline VF lookup32(const float* p, VI i) {
  return gather(p, i);
}
inline VF lookup256(const float* p, VI i) {
  return gather(p, i);
}
inline void store(uint32_t* p, VI a) {
  memcpy(p, &a, sizeof a);
}
inline void store_n(uint32_t* p, VI a, int n) {
  TENFOLD_LANES if (i < n) p[i] = a.v[i];
}

#define TENFOLD_BINARY(name, type, expr) \
  inline type name(type a, type b) {     \
    return {expr};                       \
  }
TENFOLD_BINARY(operator+, VF, a.v + b.v)
TENFOLD_BINARY(operator-, VF, a.v - b.v)
TENFOLD_BINARY(operator*, VF, a.v* b.v)
TENFOLD_BINARY(operator/, VF, a.v / b.v)
TENFOLD_BINARY(vmax, VF, a.v > b.v ? a.v : b.v)
TENFOLD_BINARY(vmin, VF, a.v < b.v ? a.v : b.v)
TENFOLD_BINARY(operator+, VI, a.v + b.v)
TENFOLD_BINARY(operator-, VI, a.v - b.v)
TENFOLD_BINARY(operator^, VI, a.v ^ b.v)
TENFOLD_BINARY(operator&, VI, a.v & b.v)
TENFOLD_BINARY(operator|, VI, a.v | b.v)
#undef TENFOLD_BINARY

// Not fused here: a libm call per lane would cost more than the rounding is worth.
inline VF fma(VF a, VF b, VF c) {
  return {a.v * b.v + c.v};
}
// a * b + c rounded once, as the instruction does it: the exact sum of the (exact) double product
// and c, rounded to odd in double, keeps what the rounding to float needs.
inline float fused_lane(float a, float b, float c) {
  const double p = static_cast<double>(a) * b, s = p + c;
  const double back = s - p, lost = (p - (s - back)) + (c - back);
  uint64_t x;
  memcpy(&x, &s, 8);
  if (lost != 0.0 && lost == lost && (x & 1) == 0) x += (lost > 0.0) == (s > 0.0) ? 1 : -1;
  double odd;
  memcpy(&odd, &x, 8);
  return static_cast<float>(odd);
}
inline VF fused(VF a, VF b, VF c) {
  VF r;
  TENFOLD_LANES r.v[i] = fused_lane(a.v[i], b.v[i], c.v[i]);
  return r;
}
inline VF fused_from(VF c, VF a, VF b) {
  VF r;
  TENFOLD_LANES r.v[i] = fused_lane(-a.v[i], b.v[i], c.v[i]);
  return r;
}
inline VF sqrt(VF a) {
  VF r;
  TENFOLD_LANES r.v[i] = sqrtf(a.v[i]);
  return r;
}
inline VF inverse(VF a) {
  return set1(1.0f) / a;
}
inline VF rint(VF a) {  // adding 1.5 * 2^23 rounds to nearest even for |a| < 2^22
  return {(a.v + 12582912.0f) - 12582912.0f};
}
// a * 2^n for integral n in [-126, 127]; below, 0.
inline VF ldexp(VF a, VF n) {
  VF r;
  TENFOLD_LANES {
    const float e = n.v[i] >= -126.0f ? n.v[i] : -127.0f;
    const uint32_t x = static_cast<uint32_t>(static_cast<int>(e) + 127) << 23;
    float f;
    memcpy(&f, &x, 4);
    r.v[i] = n.v[i] != n.v[i] ? n.v[i] : a.v[i] * f;
  }
  return r;
}

#define TENFOLD_COMPARE(name, type, expr) \
  inline VM name(type a, type b) {        \
    return {expr};                        \
  }
TENFOLD_COMPARE(lt, VF, a.v < b.v)
TENFOLD_COMPARE(gt, VF, a.v > b.v)
TENFOLD_COMPARE(ge, VF, a.v >= b.v)
TENFOLD_COMPARE(eq, VF, a.v == b.v)
TENFOLD_COMPARE(lt, VI, (Int4)a.v < (Int4)b.v)
TENFOLD_COMPARE(eq, VI, a.v == b.v)
TENFOLD_COMPARE(above, VI, a.v > b.v)  // unsigned
TENFOLD_COMPARE(both, VM, a.v & b.v)
#undef TENFOLD_COMPARE
inline VM unordered(VF a) {
  return {a.v != a.v};
}
inline bool any(VM m) {
  return (m.v[0] | m.v[1] | m.v[2] | m.v[3]) != 0;
}
// Writes the lanes of m one after another (up to kWidth words are touched); how many those are.
inline int store_chosen(uint32_t* p, VM m, VI a) {
  int count = 0;
  TENFOLD_LANES {
    p[count] = a.v[i];
    count += m.v[i] ? 1 : 0;
  }
  return count;
}
// Lane i takes bit i.
inline VM lanes_of(uint32_t word) {
  return {(Int4{1, 2, 4, 8} & static_cast<int32_t>(word)) != 0};
}
// The lanes of m one after another; what follows them is undefined. Back: lane by lane from there.
inline VF compress(VM m, VF a) {
  VF r = a;
  int count = 0;
  TENFOLD_LANES if (m.v[i]) r.v[count++] = a.v[i];
  return r;
}
inline VF expand(VM m, VF a) {
  VF r = set1(0.0f);
  int count = 0;
  TENFOLD_LANES if (m.v[i]) r.v[i] = a.v[count++];
  return r;
}
// Stores the lanes of m; the others keep their bits.
template <class T>
inline void store_where(T* p, VM m, VF a) {
  TENFOLD_LANES if (m.v[i]) put(p + i, a.v[i]);
}
inline VI load_halves(const uint16_t* p) {
  return {Word4{p[0], p[1], p[2], p[3]}};
}
// The lower halves, of lanes below 2^16.
inline void store_halves(uint16_t* p, VI a) {
  TENFOLD_LANES p[i] = static_cast<uint16_t>(a.v[i]);
}
// 1 where m, else 0.
inline void store_bytes(uint8_t* p, VM m) {
  TENFOLD_LANES p[i] = m.v[i] ? 1 : 0;
}
inline VF select(VM m, VF yes, VF no) {
  return {m.v ? yes.v : no.v};
}
inline VI select(VM m, VI yes, VI no) {
  return {m.v ? yes.v : no.v};
}

template <int N>
inline VI shr(VI a) {
  return {a.v >> N};
}
template <int N>
inline VI shr_signed(VI a) {
  return {(Word4)((Int4)a.v >> N)};
}
template <int N>
inline VI shl(VI a) {
  return {a.v << N};
}
inline VI signed_max(VI a, VI b) {
  return {(Int4)a.v > (Int4)b.v ? a.v : b.v};
}
inline VI signed_min(VI a, VI b) {
  return {(Int4)a.v < (Int4)b.v ? a.v : b.v};
}
inline VI unsigned_min(VI a, VI b) {
  return {a.v < b.v ? a.v : b.v};
}
// Signed integers that compare as floats do; both zeros are 0.
inline VI ordered(VI x) {
  return {(Int4)x.v < 0 ? 0x80000000u - x.v : x.v};
}
inline VI ordered(VF a) {
  return ordered(VI{(Word4)a.v});
}
// out[2 i] = a_i, out[2 i + 1] = b_i
inline void store_pairs(float* out, VF a, VF b) {
  TENFOLD_LANES {
    memcpy(out + 2 * i, reinterpret_cast<const char*>(&a) + 4 * i, 4);
    memcpy(out + 2 * i + 1, reinterpret_cast<const char*>(&b) + 4 * i, 4);
  }
}
// 64-bit products of the lanes with one constant: high and low halves.
inline void mulhilo(VI a, uint32_t m, VI* hi, VI* lo) {
  TENFOLD_LANES {
    const uint64_t p = static_cast<uint64_t>(m) * a.v[i];
    hi->v[i] = static_cast<uint32_t>(p >> 32);
    lo->v[i] = static_cast<uint32_t>(p);
  }
}
// out[4 i + k] = lane i of w_k. Wider vectors deal counters to lanes as
// (l % 4) * (kWidth / 4) + l / 4, so that the words of counter c end up at out + 4 c.
inline void store_by_four(uint32_t* out, VI w0, VI w1, VI w2, VI w3) {
  TENFOLD_LANES {
    out[4 * i] = w0.v[i];
    out[4 * i + 1] = w1.v[i];
    out[4 * i + 2] = w2.v[i];
    out[4 * i + 3] = w3.v[i];
  }
}
inline VI bits(VF a) {
  return {(Word4)a.v};
}
inline VF from_bits(VI a) {
  return {(Float4)a.v};
}
inline VF to_float(VI a) {  // signed
  return {__builtin_convertvector((Int4)a.v, Float4)};
}

inline float hsum(VF a) {
  return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
}
inline float hmax(VF a) {
  float m = a.v[0];
  TENFOLD_LANES m = a.v[i] > m ? a.v[i] : m;
  return m;
}
// out[i] = sum of the lanes of a_i
inline void hsum4(VF a, VF b, VF c, VF d, float* out) {
  out[0] = hsum(a);
  out[1] = hsum(b);
  out[2] = hsum(c);
  out[3] = hsum(d);
}

// The inverse of lanes_of.
inline uint32_t bits_of(VM m) {
  uint32_t r = 0;
  TENFOLD_LANES r |= (m.v[i] & 1u) << i;
  return r;
}
// Bit i: byte i of 64 is not 0. And back: bytes of 0 and 1.
inline uint64_t bits_of_bytes(const uint8_t* p) {
  uint64_t r = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t x;
    memcpy(&x, p + i, 8);
    x |= (x & 0x7F7F7F7F7F7F7F7Fu) + 0x7F7F7F7F7F7F7F7Fu;  // the top bit of what is not 0
    x = (x >> 7) & 0x0101010101010101u;
    r |= (x * 0x0102040810204080u) >> 56 << i;
  }
  return r;
}
inline void store_bits_as_bytes(uint8_t* p, uint64_t bits) {
  for (int i = 0; i < 64; i += 8) {
    uint64_t x = ((bits >> i) & 0xFFu) * 0x0101010101010101u & 0x8040201008040201u;
    x = ((x + 0x00406070787C7E7Fu) >> 7) & 0x0101010101010101u;
    memcpy(p + i, &x, 8);
  }
}

#undef TENFOLD_LANES

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
