// SPDX-License-Identifier: Apache-2.0
// Products of packed panels, and the packing. For ISA sources.
//
// A left operand is packed as tiles [depth][kTileRows], what lies along the lanes, a right operand
// as panels [depth][kPanel], whose elements are broadcast. The attention kernels hold query rows in
// the lanes, so that softmax is lane-wise arithmetic. A word is a float, or two neighbouring bf16
// along the depth (Dot) for dot products.
#pragma once

#include "core/cpu/math.h"

TENFOLD_ISA_BEGIN
namespace {

// Register blocking: kVecs * kCols sums + kVecs vectors of rows + a broadcast fit the register
// file: 3 * 8 + 4 of 32 (AVX-512), 3 * 4 + 4 of 16 (AVX2).
constexpr int kVecs = 3, kPanel = 8;
#if defined(TENFOLD_ISA_AVX512)
constexpr int kCols = 8;
#else
constexpr int kCols = 4;
#endif
constexpr int kTileRows = kVecs * kWidth;
static_assert(kTileRows % 4 == 0 && kPanel % kCols == 0);

inline int64_t round_up(int64_t x, int64_t m) {
  return (x + m - 1) / m * m;
}

// acc[j][v] += sum_i panel[i][j] * rows[i][v] for the vectors v of [First, V): the hot loop.
template <int V, bool Dot, int First = 0>
inline void multiply(const float* rows, const float* panel, int64_t depth, VF (&acc)[kCols][V]) {
#pragma GCC unroll 2
  for (int64_t i = 0; i < depth; ++i, rows += kTileRows, panel += kPanel) {
    VF a[V];
    for (int v = First; v < V; ++v) a[v] = load(rows + v * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      const VF b = set1(panel[j]);
      for (int v = First; v < V; ++v) {
#if defined(TENFOLD_ISA_BF16)
        if constexpr (Dot) {
          acc[j][v] = dot_bf16(acc[j][v], bits(a[v]), bits(b));
          continue;
        }
#endif
        acc[j][v] = fma(b, a[v], acc[j][v]);
      }
    }
  }
}

// Words whose products are added one after another before they join a sum in memory, where sums are
// long: a strip of a tile fits the first cache. Without fused multiply-adds each costs two
// roundings.
#if defined(TENFOLD_ISA_AVX512) || defined(TENFOLD_ISA_AVX2)
constexpr int64_t kStrip = 128;
#else
constexpr int64_t kStrip = 16;
#endif

// sums[8][V vectors] (+)= panel * lanes
template <int V, bool Dot>
inline void multiply_block(const float* lanes, const float* panel, int64_t depth, float* sums,
                           int64_t pitch, bool add) {
  for (int c = 0; c < kPanel; c += kCols) {
    VF acc[kCols][V];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j)
      for (int v = 0; v < V; ++v) acc[j][v] = set1(0.0f);
    multiply<V, Dot>(lanes, panel + c, depth, acc);
    float* const to = sums + c * pitch;
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j)
      for (int v = 0; v < V; ++v) {
        float* const at = to + j * pitch + v * kWidth;
        store(at, add ? acc[j][v] + load(at) : acc[j][v]);
      }
  }
}

// The same for `count` panels `stride` apart, whose sums lie below each other; `left` columns.
template <bool Dot>
inline void multiply_panels(const float* lanes, const float* panels, int64_t stride, int64_t count,
                            int64_t left, int64_t depth, float* sums, int64_t pitch, bool add) {
  for (int64_t r = 0; r < count; ++r, panels += stride, sums += kPanel * pitch) {
    if (left > 2 * kWidth) {
      multiply_block<3, Dot>(lanes, panels, depth, sums, pitch, add);
    } else if (left > kWidth) {
      multiply_block<2, Dot>(lanes, panels, depth, sums, pitch, add);
    } else {
      multiply_block<1, Dot>(lanes, panels, depth, sums, pitch, add);
    }
  }
}

#if defined(TENFOLD_ISA_BF16)
// Words of a half of `both` and of the other half, lane by lane.
inline VF pair_halves(__m512i both) {
  const __m512i lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(lanes, both))};
}
// Lane by lane the pair (a, b) rounded to bf16.
inline VF to_pairs(VF a, VF b) {
  return pair_halves((__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
}
#endif

// to[j][i] = row(i)[j] for 8 x 8 words.
#if defined(TENFOLD_ISA_AVX512) || defined(TENFOLD_ISA_AVX2)
template <class Row>
inline void transpose8_rows(const Row& row, float* to, int64_t to_pitch) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(row(i));
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = _mm256_shuffle_ps(s[i + k], s[i + k + 2], 0x44);
      r[i + 2 * k + 1] = _mm256_shuffle_ps(s[i + k], s[i + k + 2], 0xEE);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_pitch, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_pitch, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#else
template <class Row>
inline void transpose8_rows(const Row& row, float* to, int64_t to_pitch) {
  uint32_t word;
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) {
      __builtin_memcpy(&word, row(i) + j, 4);
      __builtin_memcpy(to + j * to_pitch + i, &word, 4);
    }
}
#endif

// The same of rows `pitch` apart.
inline void transpose8(const float* from, int64_t pitch, float* to, int64_t to_pitch) {
  transpose8_rows([=](int i) { return from + i * pitch; }, to, to_pitch);
}

// A row of n elements as floats, zero-padded to a multiple of 8.
template <class T>
inline void row_to_float(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  for (; i < n; i += kWidth) {
    const int left = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    store_n(to + i, load_n(from + i, left), left);
  }
  for (i = n; i % 8 != 0; ++i) to[i] = 0.0f;
}

// The same as pairs of bf16: words of two neighbours.
inline void row_to_pairs(const bf16_t* from, int64_t n, float* to) {
  __builtin_memcpy(to, from, static_cast<uint64_t>(n) * 2);
  auto* half = reinterpret_cast<bf16_t*>(to);
  for (int64_t i = n; i % 16 != 0; ++i) half[i] = bf16_t{0};
}

// Words along the depth of the first product.
template <bool Dot>
inline int64_t words(int64_t dim) {
  return Dot ? (dim + 1) / 2 : dim;
}

template <class T, bool Dot>
inline void row_to_words(const T* from, int64_t n, float* to) {
  if constexpr (Dot) {
    row_to_pairs(from, n, to);
  } else {
    row_to_float(from, n, to);
  }
}

// 8 rows from `row` on, of n, as words `pitch` apart; missing rows are zeros. Rows that are floats
// already are used where they lie.
template <class T, bool Dot>
inline const float* stage8(const T* from, int64_t stride, int64_t row, int64_t n, int64_t dim,
                           float* staged, int64_t* pitch) {
  if constexpr (sizeof(T) == 4) {
    if (row + 8 <= n && dim % 8 == 0) {
      *pitch = stride;
      return from + row * stride;
    }
  }
  *pitch = round_up(words<Dot>(dim), 8);
  for (int64_t i = 0; i < 8; ++i) {
    float* const to = staged + i * *pitch;
    if (row + i < n) {
      row_to_words<T, Dot>(from + (row + i) * stride, dim, to);
    } else {
      for (int64_t d = 0; d < *pitch; ++d) to[d] = 0.0f;
    }
  }
  return staged;
}

// Rows [0, n) of `dim` elements -> panels of 8 rows [panel][words][kPanel]; the last is padded with
// zeros. `staged`: room for 8 rows of round_up(dim, 8).
template <class T, bool Dot>
void pack_panels(const T* from, int64_t stride, int64_t n, int64_t dim, float* staged, float* to) {
  const int64_t depth = words<Dot>(dim);
  int64_t pitch;
  float spare[64];
  for (int64_t j = 0; j < n; j += 8, to += depth * kPanel) {
    const float* const rows = stage8<T, Dot>(from, stride, j, n, dim, staged, &pitch);
    int64_t d = 0;
    for (; d + 8 <= depth; d += 8) transpose8(rows + d, pitch, to + d * kPanel, kPanel);
    if (d == depth) continue;
    transpose8(rows + d, pitch, spare, 8);
    __builtin_memcpy(to + d * kPanel, spare, static_cast<uint64_t>(depth - d) * kPanel * 4);
  }
}

// Rows [0, n) -> panels of 8 of their elements, the depth along the rows: [element / 8][rows or
// pairs of rows][kPanel]; `depth` words each, in fours, of which those past n are zeros. 8 rows at
// a time: panels are often 4096 bytes apart, and lines written in halves would not stay in the
// cache.
template <class T, bool Dot>
void pack_columns(const T* from, int64_t stride, int64_t n, int64_t dim, int64_t depth,
                  float* staged, float* to) {
  int64_t pitch;
  for (int64_t j = 0; j < depth; j += words<Dot>(8)) {
    const float* const rows = stage8<T, Dot>(from, stride, Dot ? 2 * j : j, n, dim, staged, &pitch);
    for (int64_t d = 0; d < dim; d += 8) {
      float* const out = to + d * depth + j * kPanel;
      if constexpr (Dot) {
#if defined(TENFOLD_ISA_BF16)
        for (int64_t i = 0; i < 4; ++i) {
          const auto* pair = rows + 2 * i * pitch + d / 2;
          const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pair));
          const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pair + pitch));
          auto* line = reinterpret_cast<__m128i*>(out + i * kPanel);
          _mm_storeu_si128(line, _mm_unpacklo_epi16(a, b));
          _mm_storeu_si128(line + 1, _mm_unpackhi_epi16(a, b));
        }
#endif
      } else {
        for (int64_t i = 0; i < 8; ++i)
          __builtin_memcpy(out + i * kPanel, rows + i * pitch + d, kPanel * 4);
      }
    }
  }
}

// 8 rows, one pointer each (null: zeros) -> [words], n words of each (4 or 8) `to_pitch` apart.
// Rows that are whole words already are used where they lie. `staged`: room for 8 rows of
// round_up(dim, 8).
template <class T, bool Dot>
inline void pack_rows8(const T* const* row, int n, int64_t dim, float* staged, float* to,
                       int64_t to_pitch) {
  const int64_t depth = words<Dot>(dim), pitch = round_up(depth, 8);
  const bool as_is = (sizeof(T) == 4 || Dot) && dim % (Dot ? 16 : 8) == 0;
  const float* at[8];
  for (int i = 0; i < 8; ++i) {
    const bool there = i < n && row[i] != nullptr;
    at[i] = staged + i * pitch;
    if (there && as_is) {
      at[i] = reinterpret_cast<const float*>(row[i]);
    } else if (there) {
      row_to_words<T, Dot>(row[i], dim, staged + i * pitch);
    } else {
      for (int64_t d = 0; d < pitch; ++d) staged[i * pitch + d] = 0.0f;
    }
  }
  int64_t d = 0;
  const auto some = [&](int i) { return at[i] + d; };
  if (n == 8)
    for (; d + 8 <= depth; d += 8) transpose8_rows(some, to + d * to_pitch, to_pitch);
  for (; d < depth; d += 8) {
    float spare[64];
    transpose8_rows(some, spare, 8);
    const int64_t count = depth - d < 8 ? depth - d : 8;
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(to + (d + i) * to_pitch, spare + i * 8, static_cast<uint64_t>(n) * 4);
  }
}

// Rows of a tile, `lanes` of them, one pointer each (null: zeros) -> [words][kTileRows].
template <class T, bool Dot>
void pack_rows(const T* const (&row)[kTileRows], int64_t dim, float* staged, float* to,
               int64_t lanes = kTileRows) {
  for (int r = 0; r < lanes; r += 8)
    pack_rows8<T, Dot>(row + r, kTileRows - r < 8 ? kTileRows - r : 8, dim, staged, to + r,
                       kTileRows);
}

template <class T>
inline VF load_some(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load_n(p, static_cast<int>(n)) : set1(0.0f);
}

#if defined(TENFOLD_ISA_BF16)
// A vector of the next n elements of a row, then zeros.
inline VF bf16_words(const bf16_t* from, int64_t n) {
  const auto some = n >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << n) - 1u);
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, from))};
}
#endif

// Words of n elements of a row and, where a word is a pair along the depth, of the next (either
// null: zeros).
template <class T, bool Dot>
inline VF words_along(const T* row, [[maybe_unused]] const T* next, int64_t n) {
#if defined(TENFOLD_ISA_BF16)
  if constexpr (Dot) {
    const auto some = [n](const T* from) {
      return from != nullptr ? _mm256_maskz_loadu_epi16(first_n(static_cast<int>(n)), from)
                             : __m256i{};
    };
    const __m512i low = _mm512_castsi256_si512(some(row));
    return pair_halves(_mm512_inserti64x4(low, some(next), 1));
  }
#endif
  return load_some(row, n);
}

// Rows i of [0, n) (at(i): where row i lies), columns [0, cols), to words from `word` on of tiles
// of lanes.
template <class T, bool Dot, class At>
inline void pack_lanes(const At& at, int64_t n, int64_t cols, int64_t stride, float* to) {
  for (int64_t i = 0; i < n; i += Dot ? 2 : 1, to += kTileRows) {
    const T* const row = at(i);
    const T* const next = Dot && i + 1 < n ? at(i + 1) : nullptr;
    float* tile = to;
    for (int64_t c = 0; c < cols; c += kTileRows, tile += stride)
      for (int v = 0; v < kVecs; ++v) {
        const int64_t x = c + v * kWidth;
        if (x >= cols) break;
        store(tile + v * kWidth,
              words_along<T, Dot>(row + x, next != nullptr ? next + x : nullptr, cols - x));
      }
  }
}

// The same to panels of 8, `stride` apart; as many as vectors of columns fill.
template <class T, bool Dot, class At>
inline void pack_panels_along(const At& at, int64_t n, int64_t cols, int64_t stride, float* to) {
  constexpr int kSpan = kWidth < 8 ? 8 : kWidth;
  alignas(64) float span[kSpan];
  for (int64_t i = 0; i < n; i += Dot ? 2 : 1, to += kPanel) {
    const T* const row = at(i);
    const T* const next = Dot && i + 1 < n ? at(i + 1) : nullptr;
    float* panel = to;
    for (int64_t c = 0; c < cols; c += kSpan) {
      for (int v = 0; v < kSpan; v += kWidth)
        store(span + v, words_along<T, Dot>(row + c + v, next != nullptr ? next + c + v : nullptr,
                                            cols - c - v));
      for (int v = 0; v < kSpan; v += kPanel, panel += stride)
        __builtin_memcpy(panel, span + v, kPanel * 4);
    }
  }
}

// f<element, whether dot products>(), as this ISA multiplies the dtype.
template <class F>
inline auto with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f.template operator()<float, false>();
  if (dtype == Dtype::f16) return f.template operator()<fp16_t, false>();
#if defined(TENFOLD_ISA_BF16)
  return f.template operator()<bf16_t, true>();
#else
  return f.template operator()<bf16_t, false>();
#endif
}

}  // namespace
TENFOLD_ISA_END
