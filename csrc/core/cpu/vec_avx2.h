// SPDX-License-Identifier: Apache-2.0
// AVX2 + FMA + F16C: 8 lanes. See vec.h for the vocabulary.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/types.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kWidth = 8;

struct VF {
  __m256 v;
};
struct VI {
  __m256i v;
};
struct VM {
  __m256 v;
};

inline VF set1(float x) {
  return {_mm256_set1_ps(x)};
}
inline VI seti(uint32_t x) {
  return {_mm256_set1_epi32(static_cast<int>(x))};
}
inline VI iota() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)};
}
inline __m256i first_n(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), iota().v);
}

inline VF load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
inline VF load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_n(n))};
}
inline void store(float* p, VF a) {
  _mm256_storeu_ps(p, a.v);
}
inline void store_n(float* p, VF a, int n) {
  _mm256_maskstore_ps(p, first_n(n), a.v);
}
// Store past the caches; p must be aligned to the vector. Order with stream_fence().
inline void stream(float* p, VF a) {
  _mm256_stream_ps(p, a.v);
}
inline void stream_fence() {
  _mm_sfence();
}
inline VI load(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline VI load_n(const uint32_t* p, int n) {
  return {_mm256_maskload_epi32(reinterpret_cast<const int*>(p), first_n(n))};
}
inline VI load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
// The lowest byte of every lane.
inline void store_low_bytes(uint8_t* p, VI a) {
  const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(255));
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
// Signed positions.
inline VF gather(const float* p, VI at) {
  return {_mm256_i32gather_ps(p, at.v, 4)};
}
// p[i] of 32 floats, i < 32.
inline VF lookup32(const float* p, VI i) {
  return gather(p, i);
}
inline VF lookup256(const float* p, VI i) {
  return gather(p, i);
}
inline void store(uint32_t* p, VI a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
inline void store_n(uint32_t* p, VI a, int n) {
  _mm256_maskstore_epi32(reinterpret_cast<int*>(p), first_n(n), a.v);
}

// Partial 16-bit vectors go through a small buffer: AVX2 has no 16-bit masked moves.
inline __m128i load_halves(const void* p, int n) {
  uint16_t buffer[8] = {};
  const auto* from = static_cast<const uint16_t*>(p);
  for (int i = 0; i < n; ++i) buffer[i] = from[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer));
}
inline void store_halves(void* p, __m128i h, int n) {
  uint16_t buffer[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), h);
  auto* to = static_cast<uint16_t*>(p);
  for (int i = 0; i < n; ++i) to[i] = buffer[i];
}

inline VF from_bf16(__m128i h) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline VF load(const bf16_t* p) {
  return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline VF load_n(const bf16_t* p, int n) {
  return from_bf16(load_halves(p, n));
}
inline VF load(const fp16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline VF load_n(const fp16_t* p, int n) {
  return {_mm256_cvtph_ps(load_halves(p, n))};
}

// float32 bits with the upper half rounded to nearest even, NaN kept; the lower half is undefined.
inline __m256i round_to_upper_half(VF a) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(up, quiet, nan);
}
inline __m128i to_bf16(VF a) {
  const __m256i r = _mm256_srli_epi32(round_to_upper_half(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
// 2 kWidth neighbours as the even and the odd ones of them: their halves of a word need no shuffle.
inline void load_pair(const bf16_t* p, VF* even, VF* odd) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even->v = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  odd->v = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(INT32_MIN >> 15)));
}
inline void store_pair(bf16_t* p, VF even, VF odd) {
  const __m256i low = _mm256_srli_epi32(round_to_upper_half(even), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_blend_epi16(low, round_to_upper_half(odd), 0xAA));
}
inline void store(bf16_t* p, VF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a));
}
inline void store_n(bf16_t* p, VF a, int n) {
  store_halves(p, to_bf16(a), n);
}
inline void store(fp16_t* p, VF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
}
template <class T>
inline void store_quick(T* p, VF a) {
  store(p, a);
}
inline void store_n(fp16_t* p, VF a, int n) {
  store_halves(p, _mm256_cvtps_ph(a.v, 0), n);
}

inline VF operator+(VF a, VF b) {
  return {_mm256_add_ps(a.v, b.v)};
}
inline VF operator-(VF a, VF b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
inline VF operator*(VF a, VF b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
inline VF operator/(VF a, VF b) {
  return {_mm256_div_ps(a.v, b.v)};
}
inline VF fma(VF a, VF b, VF c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline VF fused(VF a, VF b, VF c) {
  return fma(a, b, c);
}
inline VF fused_from(VF c, VF a, VF b) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}
inline VF sqrt(VF a) {
  return {_mm256_sqrt_ps(a.v)};
}
inline VF inverse(VF a) {
  return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)};
}
inline VF vmax(VF a, VF b) {
  return {_mm256_max_ps(a.v, b.v)};
}
inline VF vmin(VF a, VF b) {
  return {_mm256_min_ps(a.v, b.v)};
}
inline VF rint(VF a) {
  return {_mm256_round_ps(a.v, 8)};
}

inline VM lt(VF a, VF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
}
inline VM gt(VF a, VF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)};
}
inline VM ge(VF a, VF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)};
}
inline VM unordered(VF a) {
  return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)};
}
inline VM eq(VF a, VF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)};
}
inline VM lt(VI a, VI b) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))};
}
inline VM eq(VI a, VI b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))};
}
inline VM above(VI a, VI b) {
  const __m256i flip = _mm256_set1_epi32(INT32_MIN);
  return {_mm256_castsi256_ps(
      _mm256_cmpgt_epi32(_mm256_xor_si256(a.v, flip), _mm256_xor_si256(b.v, flip)))};
}  // unsigned
inline VM both(VM a, VM b) {
  return {_mm256_and_ps(a.v, b.v)};
}
inline bool any(VM m) {
  return _mm256_movemask_ps(m.v) != 0;
}
// For every mask of 8 lanes, the chosen ones first: one byte each.
struct ChosenFirst {
  uint64_t lanes[256] = {};
  constexpr ChosenFirst() {
    for (uint64_t mask = 0; mask < 256; ++mask)
      for (uint64_t lane = 0, at = 0; lane < 8; ++lane)
        if ((mask >> lane & 1) != 0) lanes[mask] |= lane << (8 * at++);
  }
};
constexpr ChosenFirst kChosenFirst;

// Writes the lanes of m one after another (up to kWidth words are touched); how many those are.
inline int store_chosen(uint32_t* p, VM m, VI a) {
  const auto mask = static_cast<unsigned>(_mm256_movemask_ps(m.v));
  const __m128i lanes = _mm_cvtsi64_si128(static_cast<int64_t>(kChosenFirst.lanes[mask]));
  store(p, {_mm256_permutevar8x32_epi32(a.v, _mm256_cvtepu8_epi32(lanes))});
  return __builtin_popcount(mask);
}
// Lane i takes bit i.
inline VM lanes_of(uint32_t word) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i have = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(word)), bit);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(have, bit))};
}
// For every mask of 8 lanes, where in the row of chosen lanes each lane stands: one byte each.
struct RankOfLane {
  uint64_t lanes[256] = {};
  constexpr RankOfLane() {
    for (uint64_t mask = 0; mask < 256; ++mask)
      for (uint64_t lane = 0, at = 0; lane < 8; ++lane)
        if ((mask >> lane & 1) != 0) lanes[mask] |= at++ << (8 * lane);
  }
};
constexpr RankOfLane kRankOfLane;
inline VF permute_by_bytes(VF a, uint64_t lanes) {
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(lanes));
  return {_mm256_permutevar8x32_ps(a.v, _mm256_cvtepu8_epi32(bytes))};
}
// The lanes of m one after another; what follows them is undefined. Back: lane by lane from there.
inline VF compress(VM m, VF a) {
  return permute_by_bytes(a, kChosenFirst.lanes[_mm256_movemask_ps(m.v)]);
}
inline VF expand(VM m, VF a) {
  return permute_by_bytes(a, kRankOfLane.lanes[_mm256_movemask_ps(m.v)]);
}
// Stores the lanes of m; the others keep their bits (they are written with what was there).
inline void store_where(float* p, VM m, VF a) {
  _mm256_storeu_ps(p, _mm256_blendv_ps(_mm256_loadu_ps(p), a.v, m.v));
}
inline void store_halves_where(void* p, VM m, __m128i a) {
  const __m256i wide = _mm256_castps_si256(m.v);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const __m128i old = _mm_loadu_si128(static_cast<const __m128i*>(p));
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_blendv_epi8(old, a, halves));
}
inline void store_where(bf16_t* p, VM m, VF a) {
  store_halves_where(p, m, to_bf16(a));
}
inline void store_where(fp16_t* p, VM m, VF a) {
  store_halves_where(p, m, _mm256_cvtps_ph(a.v, 0));
}
inline VI load_halves(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The lower halves, of lanes below 2^16.
inline void store_halves(uint16_t* p, VI a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1)));
}
// 1 where m, else 0.
inline void store_bytes(uint8_t* p, VM m) {
  const __m256i wide = _mm256_srli_epi32(_mm256_castps_si256(m.v), 31);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
inline VF select(VM m, VF yes, VF no) {
  return {_mm256_blendv_ps(no.v, yes.v, m.v)};
}
inline VI select(VM m, VI yes, VI no) {
  return {_mm256_blendv_epi8(no.v, yes.v, _mm256_castps_si256(m.v))};
}

// a * 2^n for integral n in [-126, 127]; below, 0.
inline VF ldexp(VF a, VF n) {
  const VM small = lt(n, set1(-126.0f));
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  const VF r = {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)))};
  return {_mm256_andnot_ps(small.v, r.v)};
}

inline VI operator+(VI a, VI b) {
  return {_mm256_add_epi32(a.v, b.v)};
}
inline VI operator-(VI a, VI b) {
  return {_mm256_sub_epi32(a.v, b.v)};
}
inline VI operator^(VI a, VI b) {
  return {_mm256_xor_si256(a.v, b.v)};
}
inline VI operator&(VI a, VI b) {
  return {_mm256_and_si256(a.v, b.v)};
}
inline VI operator|(VI a, VI b) {
  return {_mm256_or_si256(a.v, b.v)};
}
template <int N>
inline VI shr(VI a) {
  return {_mm256_srli_epi32(a.v, N)};
}
template <int N>
inline VI shr_signed(VI a) {
  return {_mm256_srai_epi32(a.v, N)};
}
template <int N>
inline VI shl(VI a) {
  return {_mm256_slli_epi32(a.v, N)};
}
inline VI signed_max(VI a, VI b) {
  return {_mm256_max_epi32(a.v, b.v)};
}
inline VI signed_min(VI a, VI b) {
  return {_mm256_min_epi32(a.v, b.v)};
}
inline VI unsigned_min(VI a, VI b) {
  return {_mm256_min_epu32(a.v, b.v)};
}
// Signed integers that compare as floats do; both zeros are 0.
inline VI ordered(VF a) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256 mirrored = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(INT32_MIN), x));
  return {_mm256_castps_si256(_mm256_blendv_ps(a.v, mirrored, a.v))};
}
// out[2 i] = a_i, out[2 i + 1] = b_i
inline void store_pairs(float* out, VF a, VF b) {
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
// 64-bit products of the lanes with one constant: high and low halves.
inline void mulhilo(VI a, uint32_t m, VI* hi, VI* lo) {
  const __m256i c = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32(a.v, c);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), c);
  hi->v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  lo->v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
// out[4 i + k] = word i of w_k, over the groups of four lanes i of a half: with counters dealt to
// lanes as (l % 4) * (kWidth / 4) + l / 4, the words of counter c end up at out + 4 c.
inline void store_by_four(uint32_t* out, VI w0, VI w1, VI w2, VI w3) {
  const __m256i a = _mm256_unpacklo_epi32(w0.v, w1.v), b = _mm256_unpackhi_epi32(w0.v, w1.v);
  const __m256i c = _mm256_unpacklo_epi32(w2.v, w3.v), d = _mm256_unpackhi_epi32(w2.v, w3.v);
  store(out, {_mm256_unpacklo_epi64(a, c)});
  store(out + 8, {_mm256_unpackhi_epi64(a, c)});
  store(out + 16, {_mm256_unpacklo_epi64(b, d)});
  store(out + 24, {_mm256_unpackhi_epi64(b, d)});
}
inline VI bits(VF a) {
  return {_mm256_castps_si256(a.v)};
}
inline VF from_bits(VI a) {
  return {_mm256_castsi256_ps(a.v)};
}
inline VF to_float(VI a) {
  return {_mm256_cvtepi32_ps(a.v)};
}  // signed

inline float hsum128(__m128 s) {
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float hsum(VF a) {
  return hsum128(_mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1)));
}
inline float hmax(VF a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// out[i] = sum of the lanes of a_i
inline void hsum4(VF a, VF b, VF c, VF d, float* out) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
  const __m256 s = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

// The inverse of lanes_of.
inline uint32_t bits_of(VM m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.v));
}
// Bit i: byte i of 64 is not 0. And back: bytes of 0 and 1.
inline uint64_t bits_of_bytes(const uint8_t* p) {
  uint64_t zeros = 0;
  for (int i = 0; i < 2; ++i) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    const __m256i zero = _mm256_cmpeq_epi8(bytes, _mm256_setzero_si256());
    zeros |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(zero))) << (32 * i);
  }
  return ~zeros;
}
inline void store_bits_as_bytes(uint8_t* p, uint64_t bits) {
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                            0x0303030303030303);  // the byte that holds its bit
  const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  for (int i = 0; i < 2; ++i) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(bits >> (32 * i)));
    const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(word, spread), each);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i,
                        _mm256_and_si256(_mm256_cmpeq_epi8(set, each), _mm256_set1_epi8(1)));
  }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
