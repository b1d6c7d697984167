// Operands of the large products of moe and loss, packed as panels.h does it; but for bf16 where
// there are AMX tiles:
//   a panel has 16 rows, [words / 16][16 rows][16 words]: left tiles, one after the other;
//   lanes are [words][kTileRows] as ever: right tiles, whose rows lie kTileRows words apart.
// Their depth is padded with zeros to whole tiles, on both sides: 0 times what is left in memory
// might be NaN.
#pragma once

#include "core/cpu/amx.h"
#include "core/cpu/panels.h"

TENFOLD_ISA_BEGIN
namespace {

#if defined(TENFOLD_ISA_AMX)
template <bool Dot>
constexpr bool kByTiles = Dot;
constexpr int64_t kAmxTile = kAmxRows * 16;  // words
static_assert(kTileRows == 48 && kWidth == 16);
#else
template <bool Dot>
constexpr bool kByTiles = false;
#endif

// Rows of a panel, and what the words of a depth are a multiple of.
template <bool Dot>
constexpr int kPackRows = kByTiles<Dot> ? 16 : kPanel;
template <bool Dot>
constexpr int64_t kPackWords = kByTiles<Dot> ? 16 : 1;

template <bool Dot>
inline int64_t packed_words(int64_t n) {
  return round_up(words<Dot>(n), kPackWords<Dot>);
}

// A vector of words from the next n elements of a row, then zeros.
template <class T, bool Dot>
inline VF row_words(const T* from, int64_t n) {
#if defined(TENFOLD_ISA_BF16)
  if constexpr (Dot) {
    const auto some = n >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << n) - 1u);
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, from))};
  }
#endif
  return load_some(from, n);
}

#if defined(TENFOLD_ISA_AMX)
// to[j][i] = row(i)[j] for 16 x 16 words: quarters of rows 4 apart meet in a vector, and are turned
// within their lanes.
template <class Row>
inline void transpose16(const Row& row, float* to, int64_t to_pitch) {
  for (int k = 0; k < 16; k += 4, to += 4 * to_pitch) {
    const auto quarters = [&](int i) __attribute__((always_inline)) {
      const auto at = [&](int r) { return _mm_loadu_ps(row(r) + k); };
      __m512 v = _mm512_castps128_ps512(at(i));
      v = _mm512_insertf32x4(v, at(i + 4), 1);
      v = _mm512_insertf32x4(v, at(i + 8), 2);
      return _mm512_insertf32x4(v, at(i + 12), 3);
    };
    const __m512 a = quarters(0), b = quarters(1), c = quarters(2), d = quarters(3);
    const __m512 ab = _mm512_unpacklo_ps(a, b), cd = _mm512_unpacklo_ps(c, d);
    _mm512_storeu_ps(to, _mm512_shuffle_ps(ab, cd, 0x44));
    _mm512_storeu_ps(to + to_pitch, _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m512 ab_high = _mm512_unpackhi_ps(a, b), cd_high = _mm512_unpackhi_ps(c, d);
    _mm512_storeu_ps(to + 2 * to_pitch, _mm512_shuffle_ps(ab_high, cd_high, 0x44));
    _mm512_storeu_ps(to + 3 * to_pitch, _mm512_shuffle_ps(ab_high, cd_high, 0xEE));
  }
}

// 16 rows of n elements (null: zeros) -> a tile's width of lanes.
inline void pack_lanes16(const bf16_t* const* row, int64_t n, float* to) {
  bool all = true;
  for (int i = 0; i < 16; ++i) all = all && row[i] != nullptr;
  for (int64_t k = 0; k < n; k += 32, to += 16 * kTileRows) {
    if (all && k + 32 <= n) {
      transpose16([&](int i) { return reinterpret_cast<const float*>(row[i] + k); }, to, kTileRows);
      continue;
    }
    alignas(64) float some[kAmxTile];
    for (int i = 0; i < 16; ++i)
      store(some + i * 16,
            row[i] != nullptr ? row_words<bf16_t, true>(row[i] + k, n - k) : set1(0.0f));
    transpose16([&](int i) { return some + i * 16; }, to, kTileRows);
  }
}

// Left operands: 16 rows, and unless there are no more 16 others; in bytes.
struct LeftTiles {
  const void* at;
  int64_t row, step;  // to the next row, and 16 words on
  int64_t below;      // to the other rows
};

// sums[16 A][16 B] (+)= left tiles * B vectors of lanes, `depth` words. Six sums, one left operand
// and one right one fill the registers. between(): called after every 16 words.
template <int A, int B, class Between>
inline void multiply_tiles(const float* lanes, const LeftTiles& left, int64_t depth, float* sums,
                           int64_t pitch, bool add, const Between& between) {
  const int64_t row = pitch * 4;  // bytes
  float* const below = sums + kAmxRows * pitch;
  if (add) {
    _tile_loadd(0, sums, row);
    if constexpr (B > 1) _tile_loadd(1, sums + 16, row);
    if constexpr (B > 2) _tile_loadd(2, sums + 32, row);
    if constexpr (A > 1) _tile_loadd(3, below, row);
    if constexpr (A > 1 && B > 1) _tile_loadd(4, below + 16, row);
    if constexpr (A > 1 && B > 2) _tile_loadd(5, below + 32, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  constexpr int64_t kRight = kTileRows * 4;
  const auto* one = static_cast<const char*>(left.at);
  const char* other = one + left.below;
  for (int64_t d = 0; d < depth; d += 16) {
    _tile_loadd(6, one, left.row);
    _tile_loadd(7, lanes, kRight);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (B > 1) {
      _tile_loadd(7, lanes + 16, kRight);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (B > 2) {
      _tile_loadd(7, lanes + 32, kRight);
      _tile_dpbf16ps(2, 6, 7);
    }
    between();
    if constexpr (A > 1) {
      _tile_loadd(6, other, left.row);
      if constexpr (B > 2) {
        _tile_dpbf16ps(5, 6, 7);
        _tile_loadd(7, lanes + 16, kRight);
      }
      if constexpr (B > 1) {
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, lanes, kRight);
      }
      _tile_dpbf16ps(3, 6, 7);
    }
    one += left.step, other += left.step, lanes += 16 * kTileRows;
  }
  _tile_stored(0, sums, row);
  if constexpr (B > 1) _tile_stored(1, sums + 16, row);
  if constexpr (B > 2) _tile_stored(2, sums + 32, row);
  if constexpr (A > 1) _tile_stored(3, below, row);
  if constexpr (A > 1 && B > 1) _tile_stored(4, below + 16, row);
  if constexpr (A > 1 && B > 2) _tile_stored(5, below + 32, row);
}

// The same of as many vectors of lanes as hold `left` columns.
template <int A, class Between>
inline void multiply_lanes(const float* lanes, int64_t left, const LeftTiles& rows, int64_t depth,
                           float* sums, int64_t pitch, bool add, const Between& between) {
  if (left > 2 * kWidth) {
    multiply_tiles<A, 3>(lanes, rows, depth, sums, pitch, add, between);
  } else if (left > kWidth) {
    multiply_tiles<A, 2>(lanes, rows, depth, sums, pitch, add, between);
  } else {
    multiply_tiles<A, 1>(lanes, rows, depth, sums, pitch, add, between);
  }
}

constexpr auto kNothing = [] {};

inline LeftTiles left_panels(const float* panels, int64_t stride) {
  return {panels, 64, kAmxTile * 4, stride * 4};
}

// Strips as equal as can be; the right operands of one stay in the first cache.
constexpr int64_t kAmxStrip = 160;  // words
inline int64_t amx_strip(int64_t depth) {
  const int64_t count = (depth + kAmxStrip - 1) / kAmxStrip;
  return round_up((depth + count - 1) / count, 16);
}
#endif

// sums [rows][cols] (+)= panels `stride` apart * tiles of lanes, `depth` words: a multiple of
// kPackWords. The sums have rows for whole panels.
template <bool Dot>
void multiply_packed(const float* panels, int64_t stride, int64_t rows, const float* lanes,
                     int64_t lane_stride, int64_t cols, int64_t depth, float* sums, int64_t pitch,
                     bool add) {
  if (depth == 0) return;
  const int64_t count = (rows + kPackRows<Dot> - 1) / kPackRows<Dot>;
  int64_t strip = kStrip;
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) strip = amx_strip(depth);
  const AmxTiles tiles;
  amx_fence();
#endif
  for (int64_t d = 0; d < depth; d += strip, add = true) {
    const int64_t n = depth - d < strip ? depth - d : strip;
    const float* const left = panels + d * kPackRows<Dot>;
    for (int64_t c = 0; c < cols; c += kTileRows) {
      const float* const right = lanes + c / kTileRows * lane_stride + d * kTileRows;
#if defined(TENFOLD_ISA_AMX)
      if constexpr (Dot) {
        const float* panel = left;
        float* to = sums + c;
        for (int64_t r = 0; r < count; r += 2, panel += 2 * stride, to += 2 * kAmxRows * pitch) {
          const LeftTiles two = left_panels(panel, stride);
          if (r + 1 < count) {
            multiply_lanes<2>(right, cols - c, two, n, to, pitch, add, kNothing);
          } else {
            multiply_lanes<1>(right, cols - c, two, n, to, pitch, add, kNothing);
          }
        }
        continue;
      }
#endif
      multiply_panels<Dot>(right, left, stride, count, cols - c, n, sums + c, pitch, add);
    }
  }
}

// Rows of a panel, one pointer each (null: zeros), n elements of them. staged: room for 8 rows of
// round_up(n, 8).
template <class T, bool Dot>
inline void pack_panel(const T* const (&row)[kPackRows<Dot>], int64_t n,
                       [[maybe_unused]] float* staged, float* to) {
  if constexpr (kByTiles<Dot>) {
    for (int i = 0; i < kPackRows<Dot>; ++i, to += 16)
      for (int64_t k = 0; k < n; k += 32)
        store(to + k / 2 * 16,
              row[i] != nullptr ? row_words<T, Dot>(row[i] + k, n - k) : set1(0.0f));
  } else {
    pack_rows8<T, Dot>(row, 8, n, staged, to, kPanel);
  }
}

// Rows of a tile of lanes, `lanes` of them, likewise.
template <class T, bool Dot>
inline void pack_tile(const T* const (&row)[kTileRows], int64_t n, [[maybe_unused]] float* staged,
                      float* to, int64_t lanes = kTileRows) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) {
    for (int64_t r = 0; r < lanes; r += 16) pack_lanes16(row + r, n, to + r);
    return;
  }
#endif
  pack_rows<T, Dot>(row, n, staged, to, lanes);
}

// pack_lanes(), with zeros up to whole tiles.
template <class T, bool Dot, class At>
inline void pack_tiles_along(const At& at, int64_t n, int64_t cols, int64_t stride, float* to) {
  pack_lanes<T, Dot>(at, n, cols, stride, to);
  for (int64_t d = words<Dot>(n); d < packed_words<Dot>(n); ++d)
    for (int64_t c = 0; c < cols; c += kWidth)
      store(to + c / kTileRows * stride + d * kTileRows + c % kTileRows, set1(0.0f));
}

// As pack_panels_along(): columns [0, cols) of rows i of [0, n) -> panels.
template <class T, bool Dot, class At>
inline void pack_panels_of_columns(const At& at, int64_t n, int64_t cols, int64_t stride,
                                   float* to) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) {
    for (int64_t i = 0; i < n; i += 32, to += kAmxTile) {
      const T* row[32];
      for (int r = 0; r < 32; ++r) row[r] = i + r < n ? at(i + r) : nullptr;
      float* panel = to;
      for (int64_t c = 0; c < cols; c += 16, panel += stride) {
        alignas(64) float pairs[kAmxTile];
        const auto from = [&](int r) { return row[r] != nullptr ? row[r] + c : nullptr; };
        for (int r = 0; r < 32; r += 2)
          store(pairs + r * 8, words_along<T, Dot>(from(r), from(r + 1), cols - c));
        transpose16([&](int r) { return pairs + r * 16; }, panel, 16);
      }
    }
    return;
  }
#endif
  pack_panels_along<T, Dot>(at, n, cols, stride, to);
}

}  // namespace
TENFOLD_ISA_END
