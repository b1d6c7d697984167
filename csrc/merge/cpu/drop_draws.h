// SPDX-License-Identifier: Apache-2.0
// Draws of dare.h for a block of elements at a time, as bits of vectors of lanes. For ISA sources.
#pragma once

#include "core/cpu/math.h"
#include "merge/delta_merge.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kDraws = 4096;  // elements of a block
constexpr int64_t kDrawWords = kDraws / 64;
constexpr int64_t kStep = 512;  // that are drawn at once

#if defined(TENFOLD_ISA_AVX512)
// A word per 64-bit lane: what lies above it changes no product, and so needs no clearing.
template <int kSets>
inline void philox_wide(__m512i (&x)[kSets][4], const DropKey& key) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxMul0), m1 = _mm512_set1_epi64(kPhiloxMul1);
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
  for (int round = 0; round < 10; ++round, k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1) {
    const __m512i w0 = _mm512_set1_epi64(k0), w1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
    for (auto& y : x) {
      const __m512i p0 = _mm512_mul_epu32(y[0], m0), p1 = _mm512_mul_epu32(y[2], m1);
      y[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), y[1], w0, 0x96);
      y[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), y[3], w1, 0x96);
      y[1] = p1, y[3] = p0;
    }
  }
}

// bytes[i]: the draw of element first + i, of kStep; first is a multiple of kStep.
inline void draw_bytes(const DropKey& key, uint64_t first, uint32_t expert, uint8_t* bytes) {
  // Counters as unpacking the results puts them in order.
  const __m512i lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const uint64_t n = first >> 4;  // a multiple of 32: no carry
  __m512i x[kStep / 128][4];
  uint32_t count = static_cast<uint32_t>(n);
  for (auto& y : x) {
    y[0] = _mm512_add_epi64(_mm512_set1_epi64(count), lanes);
    y[1] = _mm512_set1_epi64(drop_word(n, expert, 0));
    y[2] = _mm512_set1_epi64(key.stream_lo), y[3] = _mm512_set1_epi64(key.stream_hi);
    count += 8;
  }
  philox_wide(x, key);
  for (const auto& y : x) {
    const __m512i a = _mm512_mask_shuffle_epi32(y[0], 0xAAAA, y[1], _MM_PERM_CCAA);
    const __m512i b = _mm512_mask_shuffle_epi32(y[2], 0xAAAA, y[3], _MM_PERM_CCAA);
    _mm512_storeu_si512(bytes, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(bytes + 64, _mm512_unpackhi_epi64(a, b));
    bytes += 128;
  }
}

// drop_by_second_draw() of elements first + at, 8 of them: a bit each.
inline uint32_t second_draws(const DropKey& key, uint64_t first, uint32_t expert, DropLimit limit,
                             const uint16_t* at) {
  const __m512i i = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  const uint64_t n = first >> 2;  // a multiple of kDraws / 4: no carry
  __m512i x[1][4] = {
      {_mm512_add_epi64(_mm512_set1_epi64(static_cast<uint32_t>(n)), _mm512_srli_epi64(i, 2)),
       _mm512_set1_epi64(drop_word(n, expert, 1)), _mm512_set1_epi64(key.stream_lo),
       _mm512_set1_epi64(key.stream_hi)}};
  philox_wide(x, key);
  const __mmask8 odd = _mm512_test_epi64_mask(i, _mm512_set1_epi64(1));
  const __mmask8 upper = _mm512_test_epi64_mask(i, _mm512_set1_epi64(2));
  const __m512i low = _mm512_mask_mov_epi64(x[0][0], odd, x[0][1]);
  const __m512i word =
      _mm512_mask_mov_epi64(low, upper, _mm512_mask_mov_epi64(x[0][2], odd, x[0][3]));
  const __m512i clear = _mm512_and_si512(word, _mm512_set1_epi64(0xFFFFFFFF));
  return _mm512_cmplt_epu64_mask(clear, _mm512_set1_epi64(limit.low));
}
#else
inline void draw_bytes(const DropKey& key, uint64_t first, uint32_t expert, uint8_t* bytes) {
  const VI lanes = counter_lanes();
  uint32_t words[4 * kWidth];
  for (int64_t i = 0; i < kStep; i += 16 * kWidth) {
    const uint64_t n = (first + static_cast<uint64_t>(i)) >> 4;  // a multiple of kWidth: no carry
    VI x[4] = {seti(static_cast<uint32_t>(n)) + lanes, seti(drop_word(n, expert, 0)),
               seti(key.stream_lo), seti(key.stream_hi)};
    philox_rounds(x, key.seed_lo, key.seed_hi);
    store_by_four(words, x[0], x[1], x[2], x[3]);
    __builtin_memcpy(bytes + i, words, sizeof(words));
  }
}

inline uint32_t second_draws(const DropKey& key, uint64_t first, uint32_t expert, DropLimit limit,
                             const uint16_t* at) {
  uint32_t dropped = 0;
  for (int k = 0; k < 8; ++k)
    dropped |= static_cast<uint32_t>(drop_by_second_draw(key, first + at[k], expert, limit)) << k;
  return dropped;
}
#endif

// Bit i: byte i of 64 is above the limit, or equal to it.
inline void compare_bytes(const uint8_t* bytes, uint8_t limit, uint64_t* above, uint64_t* equal) {
#if defined(TENFOLD_ISA_AVX512)
  const __m512i x = _mm512_loadu_si512(bytes), y = _mm512_set1_epi8(static_cast<char>(limit));
  *above = _mm512_cmpgt_epu8_mask(x, y);
  *equal = _mm512_cmpeq_epu8_mask(x, y);
#else
  uint8_t over[64], differs[64];
  for (int k = 0; k < 64; ++k) over[k] = bytes[k] > limit ? 1 : 0;
  for (int k = 0; k < 64; ++k) differs[k] = bytes[k] ^ limit;
  *above = bits_of_bytes(over);
  *equal = ~bits_of_bytes(differs);
#endif
}

// Lanes of a type may be the even elements of two vectors, then the odd ones (`split`): within
// every 2 kWidth bits the even ones come first.
inline void split_bits(uint64_t* words, int64_t count) {
  constexpr uint64_t kSwapped[] = {0x2222222222222222u, 0x0C0C0C0C0C0C0C0Cu, 0x00F000F000F000F0u,
                                   0x0000FF000000FF00u};
  for (int step = 0; (1 << step) < kWidth; ++step)
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t moved = (words[i] ^ words[i] >> (1 << step)) & kSwapped[step];
      words[i] ^= moved ^ moved << (1 << step);
    }
}
inline int64_t split_position(int64_t i) {
  constexpr int64_t kTwo = 2 * kWidth;
  return i / kTwo * kTwo + i % 2 * kWidth + i % kTwo / 2;
}

// Bits of what is kept of a block, whose first element is `first`; of its elements [from, to) at
// least.
inline void draw_kept(const DropKey& key, uint64_t first, int64_t from, int64_t to, uint32_t expert,
                      DropLimit limit, bool split, uint64_t (&kept)[kDrawWords]) {
  alignas(64) uint8_t bytes[kStep];
  uint16_t second[kDraws + 8];
  int64_t count = 0;
  const int64_t begin = from & ~(kStep - 1), end = (to + kStep - 1) & ~(kStep - 1);
  for (int64_t i = begin; i < end; i += kStep) {
    draw_bytes(key, first + static_cast<uint64_t>(i), expert, bytes);
    for (int64_t k = i; k < i + kStep; k += 64) {
      uint64_t above, equal;
      compare_bytes(bytes + (k - i), static_cast<uint8_t>(limit.high), &above, &equal);
      kept[k / 64] = above | equal;
      if (limit.low == 0) continue;
      for (; equal != 0; equal &= equal - 1)
        second[count++] = static_cast<uint16_t>(k + __builtin_ctzll(equal));
    }
  }
  for (int k = 0; k < 8; ++k) second[count + k] = 0;
  for (int64_t i = 0; i < count; i += 8) {
    const uint32_t some = count - i < 8 ? (1u << (count - i)) - 1u : 255u;
    uint32_t dropped = second_draws(key, first, expert, limit, second + i) & some;
    for (; dropped != 0; dropped &= dropped - 1) {
      const int at = second[i + __builtin_ctz(dropped)];
      kept[at / 64] &= ~(uint64_t{1} << (at % 64));
    }
  }
  if (split) split_bits(kept + begin / 64, (end - begin) / 64);
}

// What is kept of the elements of one block, from element `from` of it on.
struct Draws {
  const uint64_t (*kept)[kDrawWords];  // of each expert
  int64_t from;
  bool split;

  bool one(int e, int64_t i) const {
    const int64_t at = split ? split_position(from + i) : from + i;
    return (kept[e][at / 64] >> (at % 64) & 1) != 0;
  }
  // Vector i of the block.
  VM lanes(int e, int64_t i) const {
    if constexpr (kWidth == 16) {
      uint16_t some;
      __builtin_memcpy(&some, reinterpret_cast<const char*>(kept[e]) + 2 * i, 2);
      return lanes_of(some);
    } else if constexpr (kWidth == 8) {
      return lanes_of(reinterpret_cast<const uint8_t*>(kept[e])[i]);
    } else {
      return lanes_of(static_cast<uint32_t>(kept[e][i * kWidth / 64] >> (i * kWidth % 64)));
    }
  }
};

// Calls f(begin, end, draws) for stretches of [begin, end) that share one block of draws.
template <class F>
inline void with_draws(const DeltaMerge& m, int64_t begin, int64_t end, bool split, const F& f) {
  uint64_t kept[kMaxExperts][kDrawWords];
  for (int64_t i = begin; i < end;) {
    const int64_t at = m.offset + i, first = at & ~(kDraws - 1);
    const int64_t left = first + kDraws - at, n = end - i < left ? end - i : left;
    for (int e = 0; e < m.experts; ++e)
      draw_kept(m.key, static_cast<uint64_t>(first), at - first, at - first + n, m.number[e],
                m.drop[e], split, kept[e]);
    f(i, i + n, Draws{kept, at - first, split});
    i += n;
  }
}

}  // namespace
TENFOLD_ISA_END
