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

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
#endif
