// SPDX-License-Identifier: Apache-2.0
// The first product of the forward by AMX tiles. For ISA sources.
#pragma once

#include "core/cpu/amx_panels.h"

#if defined(TENFOLD_ISA_AMX)
TENFOLD_ISA_BEGIN
namespace {

// Keys 16 A from `keys` on. The sums begin with biases: of the next key one place before.
template <int A, int V>
inline void multiply_keys(const float* q, const float* keys, int64_t depth, const float* bias,
                          float* s) {
  constexpr int64_t kRow = kTileRows * 4, kBack = -4;  // bytes
  if (bias != nullptr) {
    _tile_loadd(0, bias, kBack);
    if constexpr (V > 1) _tile_loadd(1, bias + 16, kBack);
    if constexpr (V > 2) _tile_loadd(2, bias + 32, kBack);
    if constexpr (A > 1) _tile_loadd(3, bias - 16, kBack);
    if constexpr (A > 1 && V > 1) _tile_loadd(4, bias, kBack);
    if constexpr (A > 1 && V > 2) _tile_loadd(5, bias + 16, kBack);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  const float* const below = keys + kAmxRows * depth;
  for (int64_t d = 0; d < depth; d += kAmxWords) {
    const float* const rows = q + d * kTileRows;
    _tile_loadd(6, keys + d * kAmxRows, 64);
    _tile_loadd(7, rows, kRow);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (V > 1) {
      _tile_loadd(7, rows + 16, kRow);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (V > 2) {
      _tile_loadd(7, rows + 32, kRow);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (A > 1) {
      _tile_loadd(6, below + d * kAmxRows, 64);
      if constexpr (V > 2) {
        _tile_dpbf16ps(5, 6, 7);
        _tile_loadd(7, rows + 16, kRow);
      }
      if constexpr (V > 1) {
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, rows, kRow);
      }
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, s, kRow);
  if constexpr (V > 1) _tile_stored(1, s + 16, kRow);
  if constexpr (V > 2) _tile_stored(2, s + 32, kRow);
  float* const under = s + kAmxRows * kTileRows;
  if constexpr (A > 1) _tile_stored(3, under, kRow);
  if constexpr (A > 1 && V > 1) _tile_stored(4, under + 16, kRow);
  if constexpr (A > 1 && V > 2) _tile_stored(5, under + 32, kRow);
}

}  // namespace
TENFOLD_ISA_END
#endif
