// SPDX-License-Identifier: Apache-2.0
// Operands of the large products of moe and loss, packed and multiplied as panels.h does it, or
// bf16 where there are AMX tiles as amx_panels.h does: panels have more rows then, and the depth of
// both operands is padded with zeros to whole tiles.
#pragma once

#include "core/cpu/amx_panels.h"
#include "core/cpu/panels.h"

TENFOLD_ISA_BEGIN
namespace {

template <bool Dot>
constexpr bool kByTiles =
#if defined(TENFOLD_ISA_AMX)
    Dot;
#else
    false;
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

// Rows of a panel, one pointer each (null: zeros), n elements of them. staged: room for 8 rows of
// round_up(n, 8).
template <class T, bool Dot>
inline void pack_panel(const T* const (&row)[kPackRows<Dot>], int64_t n,
                       [[maybe_unused]] float* staged, float* to) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) return pack_panel16(row, n, to);
#endif
  pack_rows8<T, Dot>(row, 8, n, staged, to, kPanel);
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

// As pack_lanes() and pack_panels_along().
template <class T, bool Dot, class At>
inline void pack_tiles_along(const At& at, int64_t n, int64_t cols, int64_t stride, float* to) {
  pack_lanes<T, Dot>(at, n, cols, stride, to);
  for (int64_t d = words<Dot>(n); d < packed_words<Dot>(n); ++d)
    for (int64_t c = 0; c < cols; c += kWidth)
      store(to + c / kTileRows * stride + d * kTileRows + c % kTileRows, set1(0.0f));
}
template <class T, bool Dot, class At>
inline void pack_columns_along(const At& at, int64_t n, int64_t cols, int64_t stride, float* to) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) return pack_columns16(at, n, cols, stride, to);
#endif
  pack_panels_along<T, Dot>(at, n, cols, stride, to);
}

// sums [rows, in whole panels][cols] (+)= panels `stride` apart * tiles of lanes, `depth` words.
template <bool Dot>
void multiply_packed(const float* panels, int64_t stride, int64_t rows, const float* lanes,
                     int64_t lane_stride, int64_t cols, int64_t depth, float* sums, int64_t pitch,
                     bool add) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot)
    return multiply_panels16(panels, stride, rows, lanes, lane_stride, cols, depth, sums, pitch,
                             add);
#endif
  for (int64_t d = 0; d < depth; d += kStrip)
    for (int64_t c = 0; c < cols; c += kTileRows)
      multiply_panels<Dot>(lanes + c / kTileRows * lane_stride + d * kTileRows, panels + d * kPanel,
                           stride, (rows + kPanel - 1) / kPanel, cols - c,
                           depth - d < kStrip ? depth - d : kStrip, sums + c, pitch, add || d > 0);
}

}  // namespace
TENFOLD_ISA_END
