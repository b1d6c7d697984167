// SPDX-License-Identifier: Apache-2.0
// AMX tile registers for bf16 products: 8 tiles of 16 rows x 64 bytes, all configured alike.
//   C[16][16] float += A[16 rows][32 bf16] * B,  B as pairs: B[r][n] = elements 2 r, 2 r + 1 of n.
// Only for ISA sources of the avx512_amx build.
#pragma once

#if defined(TENFOLD_ISA_AMX)
#include <immintrin.h>

#include <cstdint>

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kAmxRows = 16, kAmxDepth = 32;

// The tile registers hold what they hold only while one of these is alive on the thread.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes per row (low byte of a 16-bit field)
      config[48 + t] = kAmxRows;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// gcc's tile loads do not say that they read memory: this keeps earlier stores before them.
inline void amx_fence() {
  __asm__ volatile("" ::: "memory");
}

// Blocks of 32 x 32 sums in tiles 0..3 (16 rows, 16 columns; then the next 16 columns; then the
// next rows): left operands in tiles 4 and 5, right ones in 6 and 7. Fewer sums would wait for each
// other. A block's four products take 64 cycles.
constexpr int kAmxBlock = 2 * kAmxRows;

inline void amx_zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
inline void amx_multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
// To rows of 32 floats.
inline void amx_store(float* sums) {
  constexpr int64_t kRow = kAmxBlock * 4;  // bytes
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kAmxRows, kRow);
  _tile_stored(2, sums + kAmxRows * kAmxBlock, kRow);
  _tile_stored(3, sums + kAmxRows * kAmxBlock + kAmxRows, kRow);
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
#endif
