// SPDX-License-Identifier: Apache-2.0
// The products of dha_attention_backward on tiles of at most kBlock queries x kBlock keys, and
// where their operands lie. For ISA sources.
#pragma once

#include "attention/cpu/dha_attention_backward.h"
#include "core/cpu/math.h"

TENFOLD_ISA_BEGIN
namespace {

// Register blocking: kVecs * kRows accumulators + kVecs rows of one operand + a broadcast must fit
// the register file: 2 * 12 + 3 of 32 (AVX-512), 2 * 6 + 3 of 16 (AVX2).
constexpr int kVecs = 2;
#if defined(TENFOLD_ISA_AVX512)
constexpr int kRows = 12;
#elif defined(TENFOLD_ISA_AVX2)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int kLanes = kVecs * kWidth;
constexpr int kBlock = kBackwardBlock;
static_assert(kBlock % kRows == 0 && kBlock % kLanes == 0);

inline int64_t round_up(int64_t x, int64_t m) {
  return (x + m - 1) / m * m;
}

// Words of a row of an operand: an odd number of cache lines, so that neighbouring rows do not
// compete for the same cache sets.
inline int64_t spread(int64_t words) {
  return ((words + 15) / 16 | 1) * 16;
}
constexpr int64_t kTilePitch = (kBlock / 16 | 1) * 16;

// How products are multiplied: float32, or pairs of bf16 along the summed dimension.
struct Fma {
  using Word = float;
  static constexpr int kDepth = 1;  // elements of a word
  static inline VF row(const float* p) { return load(p); }
  static inline VF one(float x) { return set1(x); }
  static inline VF multiply(VF a, VF b, VF sum) { return fma(a, b, sum); }
};
#if defined(TENFOLD_ISA_BF16)
struct Dot {
  using Word = uint32_t;
  static constexpr int kDepth = 2;
  static inline VI row(const uint32_t* p) { return load(p); }
  static inline VI one(uint32_t x) { return seti(x); }
  static inline VF multiply(VI a, VI b, VF sum) { return dot_bf16(sum, a, b); }
  // Words (a[i], b[i]) and (a[2 i], a[2 i + 1]), rounded to nearest even.
  static inline VI pair(VF a, VF b) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
    const __m512i order = _mm512_or_si512(iota().v, _mm512_slli_epi32((iota() + seti(16)).v, 16));
    return {_mm512_permutexvar_epi16(order, halves)};
  }
  static inline void store_pairs(uint32_t* p, VF a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
  }
};
#endif

// Where the broadcast operand of a product has its summed dimension: along its rows or its columns.
enum class Along { rows, columns };

// acc[r][v] += sum_k a(r, k) * b[k][v]: the hot loop.
template <class M, Along kAlong, int kNumVecs>
inline __attribute__((always_inline)) void multiply(const typename M::Word* a, int64_t a_pitch,
                                                    const typename M::Word* b, int64_t b_pitch,
                                                    int64_t depth, VF (&acc)[kRows][kNumVecs]) {
  // Three rows share a base pointer: base + 0, 1, 2 pitches are addressing modes.
  constexpr int kBases = (kRows + 2) / 3;
  const typename M::Word* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = a + (kAlong == Along::rows ? 3 * i * a_pitch : 3 * i);
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    decltype(M::row(b)) rows[kNumVecs];
    for (int v = 0; v < kNumVecs; ++v) rows[v] = M::row(b + v * kWidth);
    b += b_pitch;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto one =
          M::one(kAlong == Along::rows ? base[r / 3][r % 3 * a_pitch + k] : a[k * a_pitch + r]);
      for (int v = 0; v < kNumVecs; ++v) acc[r][v] = M::multiply(one, rows[v], acc[r][v]);
    }
  }
}

template <int kNumVecs>
inline __attribute__((always_inline)) void clear(VF (&acc)[kRows][kNumVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kNumVecs; ++v) acc[r][v] = set1(0.0f);
}

// The same, from 0 on, for the product of two rows. float32 sums are made in chains of kChain
// terms: long ones round more, and an error of a logit is a relative error of its weight.
constexpr int64_t kChain = 32;

template <class M>
inline __attribute__((always_inline)) void dot_rows(const typename M::Word* a, int64_t a_pitch,
                                                    const typename M::Word* b, int64_t depth,
                                                    VF (&acc)[kRows][kVecs]) {
  clear(acc);
  if (M::kDepth > 1 || depth <= kChain)
    return multiply<M, Along::rows>(a, a_pitch, b, kLanes, depth, acc);
  alignas(64) float earlier[kRows][kLanes];
  const int64_t chains = (depth + kChain - 1) / kChain, chain = (depth + chains - 1) / chains;
  for (int64_t k = 0; k < depth; k += chain) {
    const int64_t n = depth - k < chain ? depth - k : chain;
    multiply<M, Along::rows>(a + k, a_pitch, b + k * kLanes, kLanes, n, acc);
    if (k > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVecs; ++v) acc[r][v] = acc[r][v] + load(earlier[r] + v * kWidth);
    }
    if (k + chain >= depth) return;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) store(earlier[r] + v * kWidth, acc[r][v]);
    clear(acc);
  }
}

// c[r][0, kNumVecs * kWidth) += a * b for kRows rows of c.
template <class M, Along kAlong, int kNumVecs>
inline void add_product(const typename M::Word* a, int64_t a_pitch, const typename M::Word* b,
                        int64_t b_pitch, int64_t depth, float* c, int64_t c_pitch) {
  VF acc[kRows][kNumVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kNumVecs; ++v) acc[r][v] = load(c + r * c_pitch + v * kWidth);
  multiply<M, kAlong>(a, a_pitch, b, b_pitch, depth, acc);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kNumVecs; ++v) store(c + r * c_pitch + v * kWidth, acc[r][v]);
}

// The same for up to kLanes columns, of which `left` are left: a multiple of kWidth.
template <class M, Along kAlong>
inline void add_rows(const typename M::Word* a, int64_t a_pitch, const typename M::Word* b,
                     int64_t b_pitch, int64_t depth, float* c, int64_t c_pitch, int64_t left) {
  if (depth <= 0) return;
  if (left >= kLanes)
    return add_product<M, kAlong, kVecs>(a, a_pitch, b, b_pitch, depth, c, c_pitch);
  add_product<M, kAlong, 1>(a, a_pitch, b, b_pitch, depth, c, c_pitch);
}

}  // namespace
TENFOLD_ISA_END
