// SPDX-License-Identifier: Apache-2.0
// Products of bf16 operands by AMX tiles, for packed.h and the sources that use it. Left operands
// are
//   panels of 16 rows, [words / 16][16 rows][16 words]: tiles one after the other; or
//   rows of a matrix as they lie;
// right ones tiles of lanes as in panels.h, [words][kTileRows]. A depth is whole tiles, padded with
// zeros on both sides: 0 times what is left in memory might be NaN.
// Only for ISA sources of the avx512_amx build.
#pragma once

#include "core/cpu/amx.h"

#if defined(TENFOLD_ISA_AMX)
#include "core/cpu/panels.h"

TENFOLD_ISA_BEGIN
namespace {

static_assert(kTileRows == 48 && kWidth == 16);
constexpr int64_t kAmxWords = 16;  // of a row of a tile
constexpr int64_t kAmxTile = kAmxRows * kAmxWords;

inline int64_t amx_words(int64_t n) {
  return round_up(words<true>(n), kAmxWords);
}

// -- packing -------------------------------------------------------------------------------------

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

// 16 rows of n elements (null: zeros) -> a panel.
inline void pack_panel16(const bf16_t* const* row, int64_t n, float* to) {
  for (int i = 0; i < kAmxRows; ++i, to += kAmxWords)
    for (int64_t k = 0; k < n; k += kAmxDepth)
      store(to + k / kAmxDepth * kAmxTile,
            row[i] != nullptr ? bf16_words(row[i] + k, n - k) : set1(0.0f));
}

// 16 rows of n elements (null: zeros) -> a tile's width of lanes.
inline void pack_lanes16(const bf16_t* const* row, int64_t n, float* to) {
  bool all = true;
  for (int i = 0; i < 16; ++i) all = all && row[i] != nullptr;
  for (int64_t k = 0; k < n; k += kAmxDepth, to += kAmxWords * kTileRows) {
    if (all && k + kAmxDepth <= n) {
      transpose16([&](int i) { return reinterpret_cast<const float*>(row[i] + k); }, to, kTileRows);
      continue;
    }
    alignas(64) float some[kAmxTile];
    for (int i = 0; i < 16; ++i)
      store(some + i * kAmxWords, row[i] != nullptr ? bf16_words(row[i] + k, n - k) : set1(0.0f));
    transpose16([&](int i) { return some + i * kAmxWords; }, to, kTileRows);
  }
}

// Columns [0, cols) of rows i of [0, n) (at(i): where row i lies) -> panels `stride` apart, the
// depth along the rows.
template <class At>
inline void pack_columns16(const At& at, int64_t n, int64_t cols, int64_t stride, float* to) {
  for (int64_t i = 0; i < n; i += kAmxDepth, to += kAmxTile) {
    const bf16_t* row[kAmxDepth];
    for (int r = 0; r < kAmxDepth; ++r) row[r] = i + r < n ? at(i + r) : nullptr;
    float* panel = to;
    for (int64_t c = 0; c < cols; c += kAmxRows, panel += stride) {
      alignas(64) float pairs[kAmxTile];
      const auto from = [&](int r) { return row[r] != nullptr ? row[r] + c : nullptr; };
      for (int r = 0; r < kAmxDepth; r += 2)
        store(pairs + r / 2 * 16, words_along<bf16_t, true>(from(r), from(r + 1), cols - c));
      transpose16([&](int r) { return pairs + r * 16; }, panel, kAmxWords);
    }
  }
}

// -- products ------------------------------------------------------------------------------------

// 16 rows, 16 others below them, and so on; in bytes.
struct LeftTiles {
  const void* at;
  int64_t row, step;  // to the next row, and kAmxWords on
  int64_t below;
};

inline LeftTiles left_panels(const float* panels, int64_t stride) {
  return {panels, kAmxWords * 4, kAmxTile * 4, stride * 4};
}

// sums[16 A][16 B] (+)= left tiles * B vectors of lanes, `depth` words. Six sums, one left operand
// and one right one fill the registers. between(): called after every kAmxWords.
template <int A, int B, class Between>
inline void multiply_tiles(const float* lanes, const LeftTiles& left, int64_t depth, float* sums,
                           int64_t pitch, bool add, Between& between) {
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
  for (int64_t d = 0; d < depth; d += kAmxWords) {
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
    one += left.step, other += left.step, lanes += kAmxWords * kTileRows;
  }
  _tile_stored(0, sums, row);
  if constexpr (B > 1) _tile_stored(1, sums + 16, row);
  if constexpr (B > 2) _tile_stored(2, sums + 32, row);
  if constexpr (A > 1) _tile_stored(3, below, row);
  if constexpr (A > 1 && B > 1) _tile_stored(4, below + 16, row);
  if constexpr (A > 1 && B > 2) _tile_stored(5, below + 32, row);
}

// The same of as many vectors of lanes as hold `cols` columns.
template <int A, class Between>
inline void multiply_lanes(const float* lanes, int64_t cols, const LeftTiles& left, int64_t depth,
                           float* sums, int64_t pitch, bool add, Between& between) {
  if (cols > 2 * kWidth) {
    multiply_tiles<A, 3>(lanes, left, depth, sums, pitch, add, between);
  } else if (cols > kWidth) {
    multiply_tiles<A, 2>(lanes, left, depth, sums, pitch, add, between);
  } else {
    multiply_tiles<A, 1>(lanes, left, depth, sums, pitch, add, between);
  }
}

// Strips as equal as can be, of which a tile of lanes stays in the first cache.
constexpr int64_t kAmxStrip = 144;  // words
inline int64_t amx_strip(int64_t depth) {
  const int64_t count = (depth + kAmxStrip - 1) / kAmxStrip;
  return round_up((depth + count - 1) / count, kAmxWords);
}

// sums [rows, in whole tiles][cols] (+)= left tiles * tiles of lanes, strip by strip.
template <class Between>
inline void multiply_block(const LeftTiles& left, int64_t rows, const float* lanes,
                           int64_t lane_stride, int64_t cols, int64_t depth, int64_t strip,
                           float* sums, int64_t pitch, bool add, Between& between) {
  amx_fence();
  for (int64_t d = 0; d < depth; d += strip, add = true) {
    const int64_t n = depth - d < strip ? depth - d : strip;
    for (int64_t c = 0; c < cols; c += kTileRows) {
      const float* const right = lanes + c / kTileRows * lane_stride + d * kTileRows;
      const auto* at = static_cast<const char*>(left.at) + d / kAmxWords * left.step;
      for (int64_t r = 0; r < rows; r += 2 * kAmxRows, at += 2 * left.below) {
        const LeftTiles two{at, left.row, left.step, left.below};
        float* const to = sums + r * pitch + c;
        if (rows - r > kAmxRows) {
          multiply_lanes<2>(right, cols - c, two, n, to, pitch, add, between);
        } else {
          multiply_lanes<1>(right, cols - c, two, n, to, pitch, add, between);
        }
      }
    }
  }
}

// As multiply_packed() of packed.h.
inline void multiply_panels16(const float* panels, int64_t stride, int64_t rows, const float* lanes,
                              int64_t lane_stride, int64_t cols, int64_t depth, float* sums,
                              int64_t pitch, bool add) {
  if (depth == 0) return;
  const AmxTiles registers;
  const auto nothing = [] {};
  multiply_block(left_panels(panels, stride), rows, lanes, lane_stride, cols, depth,
                 amx_strip(depth), sums, pitch, add, nothing);
}

// -- rows of a matrix as they lie ----------------------------------------------------------------

struct LeftRows {
  const bf16_t* from;
  int64_t stride, rows;
};

// Lines of n elements of rows that will be needed soon: a few with every call.
class Ahead {
 public:
  Ahead(const LeftRows& rows, int64_t n, int64_t calls)
      : at_(reinterpret_cast<const char*>(rows.from)),
        of_row_((n * 2 + 63) / 64),
        skip_(rows.stride * 2 - of_row_ * 64),
        in_row_(of_row_),
        left_(rows.rows * of_row_),
        each_((left_ + calls - 1) / calls) {}
  void operator()() {
    const int64_t n = each_ < left_ ? each_ : left_;
    left_ -= n;
    for (int64_t i = 0; i < n; ++i, at_ += 64) {
      __builtin_prefetch(at_, 0, 2);
      if (--in_row_ == 0) in_row_ = of_row_, at_ += skip_;
    }
  }

 private:
  const char* at_;
  int64_t of_row_, skip_, in_row_, left_, each_;
};

// sums [rows, in whole tiles][cols] (+)= n elements of rows * tiles of lanes. `block` rows at a
// time (a multiple of kAmxBlock) meet all lanes in strips of `strip` words, while the next ones are
// on their way from memory. Rows that tiles would read past their end are copied first, kAmxBlock
// at a time, to `spare`. done(r, rows, sums): rows from r on are done; where those of the next go.
template <class Done>
inline void multiply_rows(const LeftRows& all, int64_t n, int64_t block, int64_t strip,
                          float* spare, const float* lanes, int64_t lane_stride, int64_t cols,
                          float* sums, int64_t pitch, bool add, const Done& done) {
  const int64_t depth = amx_words(n), tiles = (cols + kTileRows - 1) / kTileRows;
  for (int64_t r = 0, rows; r < all.rows; r += rows) {
    const bf16_t* const from = all.from + r * all.stride;
    const int64_t left = all.rows - r;
    LeftTiles these{from, all.stride * 2, kAmxDepth * 2, kAmxRows * all.stride * 2};
    if (left >= kAmxBlock && n % kAmxDepth == 0) {
      rows = left < block ? left / kAmxBlock * kAmxBlock : block;
    } else {
      rows = left < kAmxBlock ? left : kAmxBlock;
      const bf16_t* row[kAmxBlock] = {};
      for (int64_t i = 0; i < rows; ++i) row[i] = from + i * all.stride;
      pack_panel16(row, n, spare);
      pack_panel16(row + kAmxRows, n, spare + kAmxRows * depth);
      these = left_panels(spare, kAmxRows * depth);
    }
    const int64_t calls = depth / kAmxWords * tiles * ((rows + kAmxBlock - 1) / kAmxBlock);
    Ahead ahead({from + rows * all.stride, all.stride, rows}, n, calls);
    multiply_block(these, rows, lanes, lane_stride, cols, depth, strip, sums, pitch, add, ahead);
    sums = done(r, rows, sums);
  }
}

}  // namespace
TENFOLD_ISA_END
#endif
