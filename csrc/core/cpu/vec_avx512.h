// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, BW, DQ, VL): 16 lanes. See vec.h for the vocabulary.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/types.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kWidth = 16;

struct VF {
  __m512 v;
};
struct VI {
  __m512i v;
};
using VM = __mmask16;

inline VM first_n(int n) {
  return static_cast<VM>(n >= 16 ? 0xFFFF : (1u << n) - 1u);
}

inline VF set1(float x) {
  return {_mm512_set1_ps(x)};
}
inline VI seti(uint32_t x) {
  return {_mm512_set1_epi32(static_cast<int>(x))};
}
inline VI iota() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}

inline VF load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline VF load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_n(n), p)};
}
inline void store(float* p, VF a) {
  _mm512_storeu_ps(p, a.v);
}
inline void store_n(float* p, VF a, int n) {
  _mm512_mask_storeu_ps(p, first_n(n), a.v);
}
// Store past the caches; p must be aligned to the vector. Order with stream_fence().
inline void stream(float* p, VF a) {
  _mm512_stream_ps(p, a.v);
}
inline void stream_fence() {
  _mm_sfence();
}
inline VI load(const uint32_t* p) {
  return {_mm512_loadu_si512(p)};
}
inline VI load_n(const uint32_t* p, int n) {
  return {_mm512_maskz_loadu_epi32(first_n(n), p)};
}
inline VI load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The lowest byte of every lane.
inline void store_low_bytes(uint8_t* p, VI a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// Signed positions.
inline VF gather(const float* p, VI at) {
  return {_mm512_i32gather_ps(at.v, p, 4)};
}
// p[i] of 32 floats, i < 32.
inline VF lookup32(const float* p, VI i) {
  return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), i.v, _mm512_loadu_ps(p + 16))};
}
// p[i] of 256 floats, i < 256: eight look-ups of 32 take less than a gather.
inline VF lookup256(const float* p, VI i) {
  const __mmask16 b5 = _mm512_test_epi32_mask(i.v, _mm512_set1_epi32(32));
  const __mmask16 b6 = _mm512_test_epi32_mask(i.v, _mm512_set1_epi32(64));
  const __mmask16 b7 = _mm512_test_epi32_mask(i.v, _mm512_set1_epi32(128));
  const auto pick = [](__mmask16 m, __m512 yes, __m512 no) {
    return _mm512_mask_mov_ps(no, m, yes);
  };
  const auto quarter = [&](const float* q) {
    return pick(b5, lookup32(q + 32, i).v, lookup32(q, i).v);
  };
  return {pick(b7, pick(b6, quarter(p + 192), quarter(p + 128)),
               pick(b6, quarter(p + 64), quarter(p)))};
}
inline void store(uint32_t* p, VI a) {
  _mm512_storeu_si512(p, a.v);
}
inline void store_n(uint32_t* p, VI a, int n) {
  _mm512_mask_storeu_epi32(p, first_n(n), a.v);
}

inline VF from_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline VF load(const bf16_t* p) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline VF load_n(const bf16_t* p, int n) {
  return from_bf16(_mm256_maskz_loadu_epi16(first_n(n), p));
}
inline VF load(const fp16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline VF load_n(const fp16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_n(n), p))};
}

// float32 bits with the upper half rounded to nearest even, NaN kept; the lower half is undefined.
inline __m512i round_to_upper_half(VF a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
}
inline __m256i to_bf16(VF a) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_upper_half(a), 16));
}
inline void store(bf16_t* p, VF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
}
// The bits of store, for loops that round all they write: one instruction where the CPU has it and
// no lane is subnormal (it would give 0 for those).
constexpr int kSubnormal = 0x20;
inline __m256i to_bf16_quick(VF a) {
#if defined(TENFOLD_ISA_BF16)
  if (_mm512_fpclass_ps_mask(a.v, kSubnormal) == 0) [[likely]]
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#endif
  return to_bf16(a);
}
// 2 kWidth neighbours as the even and the odd ones of them: their halves of a word need no shuffle.
inline void load_pair(const bf16_t* p, VF* even, VF* odd) {
  const __m512i words = _mm512_loadu_si512(p);
  even->v = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd->v = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(INT32_MIN >> 15)));
}
inline void store_pair(bf16_t* p, VF even, VF odd) {
#if defined(TENFOLD_ISA_BF16)
  const __mmask16 small =
      _mm512_fpclass_ps_mask(even.v, kSubnormal) | _mm512_fpclass_ps_mask(odd.v, kSubnormal);
  if (small == 0) [[likely]] {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    const __m512i i = iota().v;  // word 2 i is element i of the even ones, 2 i + 1 of the odd ones
    const __m512i order =
        _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(16)), 16));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
    return;
  }
#endif
  const __m512i low = _mm512_srli_epi32(round_to_upper_half(even), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAA, low, round_to_upper_half(odd)));
}
inline void store_quick(bf16_t* p, VF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_quick(a));
}
inline void store_quick(float* p, VF a) {
  store(p, a);
}
inline void store_n(bf16_t* p, VF a, int n) {
  _mm256_mask_storeu_epi16(p, first_n(n), to_bf16(a));
}
inline void store(fp16_t* p, VF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
}
inline void store_quick(fp16_t* p, VF a) {
  store(p, a);
}
inline void store_n(fp16_t* p, VF a, int n) {
  _mm256_mask_storeu_epi16(p, first_n(n), _mm512_cvtps_ph(a.v, 0));
}

inline VF operator+(VF a, VF b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline VF operator-(VF a, VF b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline VF operator*(VF a, VF b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline VF operator/(VF a, VF b) {
  return {_mm512_div_ps(a.v, b.v)};
}
inline VF fma(VF a, VF b, VF c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline VF fused(VF a, VF b, VF c) {
  return fma(a, b, c);
}
inline VF fused_from(VF c, VF a, VF b) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}
inline VF sqrt(VF a) {
  return {_mm512_sqrt_ps(a.v)};
}
// 1 / a of a normal number, within about an ulp: a division takes three times as long.
inline VF inverse(VF a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f)), r)};
}
inline VF vmax(VF a, VF b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline VF vmin(VF a, VF b) {
  return {_mm512_min_ps(a.v, b.v)};
}
inline VF rint(VF a) {
  return {_mm512_roundscale_ps(a.v, 8)};
}
inline VF ldexp(VF a, VF n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}

inline VM lt(VF a, VF b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
}
inline VM gt(VF a, VF b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ);
}
inline VM ge(VF a, VF b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ);
}
inline VM unordered(VF a) {
  return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
}
inline VM eq(VF a, VF b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
}
inline VM lt(VI a, VI b) {
  return _mm512_cmplt_epi32_mask(a.v, b.v);
}  // signed
inline VM eq(VI a, VI b) {
  return _mm512_cmpeq_epi32_mask(a.v, b.v);
}
inline VM above(VI a, VI b) {
  return _mm512_cmpgt_epu32_mask(a.v, b.v);
}  // unsigned
inline VM both(VM a, VM b) {
  return a & b;
}
inline bool any(VM m) {
  return m != 0;
}
// Writes the lanes of m one after another (up to kWidth words are touched); how many those are.
inline int store_chosen(uint32_t* p, VM m, VI a) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, a.v));
  return __builtin_popcount(m);
}
// Lane i takes bit i.
inline VM lanes_of(uint32_t word) {
  return static_cast<VM>(word);
}
// The lanes of m one after another; what follows them is undefined. Back: lane by lane from there.
inline VF compress(VM m, VF a) {
  return {_mm512_maskz_compress_ps(m, a.v)};
}
inline VF expand(VM m, VF a) {
  return {_mm512_maskz_expand_ps(m, a.v)};
}
// Stores the lanes of m; the others keep their bits (they are written with what was there).
inline void store_where(float* p, VM m, VF a) {
  _mm512_storeu_ps(p, _mm512_mask_mov_ps(_mm512_loadu_ps(p), m, a.v));
}
inline void store_halves_where(void* p, VM m, __m256i a) {
  const __m256i old = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_mask_mov_epi16(old, m, a));
}
inline void store_where(bf16_t* p, VM m, VF a) {
  store_halves_where(p, m, to_bf16_quick(a));
}
inline void store_where(fp16_t* p, VM m, VF a) {
  store_halves_where(p, m, _mm512_cvtps_ph(a.v, 0));
}
inline VI load_halves(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// The lower halves, of lanes below 2^16.
inline void store_halves(uint16_t* p, VI a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
// 1 where m, else 0.
inline void store_bytes(uint8_t* p, VM m) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_maskz_set1_epi8(m, 1));
}
inline VF select(VM m, VF yes, VF no) {
  return {_mm512_mask_mov_ps(no.v, m, yes.v)};
}
inline VI select(VM m, VI yes, VI no) {
  return {_mm512_mask_mov_epi32(no.v, m, yes.v)};
}

inline VI operator+(VI a, VI b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
inline VI operator-(VI a, VI b) {
  return {_mm512_sub_epi32(a.v, b.v)};
}
inline VI operator^(VI a, VI b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
inline VI operator&(VI a, VI b) {
  return {_mm512_and_si512(a.v, b.v)};
}
inline VI operator|(VI a, VI b) {
  return {_mm512_or_si512(a.v, b.v)};
}
template <int N>
inline VI shr(VI a) {
  return {_mm512_srli_epi32(a.v, N)};
}
template <int N>
inline VI shr_signed(VI a) {
  return {_mm512_srai_epi32(a.v, N)};
}
template <int N>
inline VI shl(VI a) {
  return {_mm512_slli_epi32(a.v, N)};
}
inline VI signed_max(VI a, VI b) {
  return {_mm512_max_epi32(a.v, b.v)};
}
inline VI signed_min(VI a, VI b) {
  return {_mm512_min_epi32(a.v, b.v)};
}
inline VI unsigned_min(VI a, VI b) {
  return {_mm512_min_epu32(a.v, b.v)};
}
// Signed integers that compare as floats do; both zeros are 0.
inline VI ordered(VI x) {
  const __mmask16 negative = _mm512_movepi32_mask(x.v);
  return {_mm512_mask_sub_epi32(x.v, negative, _mm512_set1_epi32(INT32_MIN), x.v)};
}
inline VI ordered(VF a) {
  return ordered(VI{_mm512_castps_si512(a.v)});
}
// out[2 i] = a_i, out[2 i + 1] = b_i
inline void store_pairs(float* out, VF a, VF b) {
  const __m512i i = iota().v;  // lane l is of pair l / 2
  const __m512i first = _mm512_or_si512(
      _mm512_srli_epi32(i, 1), _mm512_slli_epi32(_mm512_and_si512(i, _mm512_set1_epi32(1)), 4));
  const __m512i rest = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(a.v, first, b.v));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(a.v, rest, b.v));
}
// 64-bit products of the lanes with one constant: high and low halves.
inline void mulhilo(VI a, uint32_t m, VI* hi, VI* lo) {
  const __m512i c = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32(a.v, c);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), c);
  hi->v = _mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xF5));
  lo->v = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0));
}
// out[4 i + k] = word i of w_k, over the groups of four lanes i of a quarter: with counters dealt
// to lanes as (l % 4) * (kWidth / 4) + l / 4, the words of counter c end up at out + 4 c.
inline void store_by_four(uint32_t* out, VI w0, VI w1, VI w2, VI w3) {
  const __m512i a = _mm512_unpacklo_epi32(w0.v, w1.v), b = _mm512_unpackhi_epi32(w0.v, w1.v);
  const __m512i c = _mm512_unpacklo_epi32(w2.v, w3.v), d = _mm512_unpackhi_epi32(w2.v, w3.v);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, c));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, c));
  _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(b, d));
  _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(b, d));
}
inline VI bits(VF a) {
  return {_mm512_castps_si512(a.v)};
}
inline VF from_bits(VI a) {
  return {_mm512_castsi512_ps(a.v)};
}
inline VF to_float(VI a) {
  return {_mm512_cvtepi32_ps(a.v)};
}  // signed

inline float hsum(VF a) {
  return _mm512_reduce_add_ps(a.v);
}
inline float hmax(VF a) {
  return _mm512_reduce_max_ps(a.v);
}

// out[i] = sum of the lanes of a_i
inline void hsum4(VF a, VF b, VF c, VF d, float* out) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

// The inverse of lanes_of.
inline uint32_t bits_of(VM m) {
  return m;
}
// Bit i: byte i of 64 is not 0. And back: bytes of 0 and 1.
inline uint64_t bits_of_bytes(const uint8_t* p) {
  const __m512i bytes = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(bytes, bytes);
}
inline void store_bits_as_bytes(uint8_t* p, uint64_t bits) {
  _mm512_storeu_si512(p, _mm512_maskz_set1_epi8(bits, 1));
}

#if defined(TENFOLD_ISA_BF16)
// c + pairwise dot products of bf16 lanes (two per float lane), products exact, float32 sums.
inline VF dot_bf16(VF c, VI a, VI b) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
