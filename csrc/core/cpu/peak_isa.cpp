// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/amx.h"
#include "core/cpu/peak.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

// Enough independent chains to cover latency x throughput of two pipes; fits 16 registers too.
constexpr int kChains = 12;

}  // namespace

double peak_fma_fp32(int64_t iters, float* sink) {
  VF acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = set1(static_cast<float>(c));
  const VF a = set1(sink[0]), b = set1(sink[1]);
  for (int64_t i = 0; i < iters; ++i)
    for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], a, b);
  for (int c = 1; c < kChains; ++c) acc[0] = acc[0] + acc[c];
  sink[0] = hsum(acc[0]);
  return 2.0 * kWidth * kChains * static_cast<double>(iters);
}

double peak_dot_bf16(int64_t iters, float* sink) {
#if defined(TENFOLD_ISA_AMX)
  alignas(64) uint16_t operand[kAmxRows * kAmxDepth];
  alignas(64) float result[kAmxRows * 16];
  for (uint16_t& x : operand) x = 0x3C00;  // a small number
  const AmxTiles tiles;
  amx_fence();
  _tile_loadd(4, operand, 64);
  _tile_loadd(5, operand, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < iters; ++i) {  // four independent chains cover the latency
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, result, 64);
  sink[0] = result[0];
  return 4.0 * 2.0 * kAmxRows * 16 * kAmxDepth * static_cast<double>(iters);
#elif defined(TENFOLD_ISA_BF16)
  VF acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = set1(static_cast<float>(c));
  const VI a = bits(set1(sink[0])), b = bits(set1(sink[1]));
  for (int64_t i = 0; i < iters; ++i)
    for (int c = 0; c < kChains; ++c) acc[c] = dot_bf16(acc[c], a, b);
  for (int c = 1; c < kChains; ++c) acc[0] = acc[0] + acc[c];
  sink[0] = hsum(acc[0]);
  return 4.0 * kWidth * kChains * static_cast<double>(iters);
#else
  (void)iters;
  (void)sink;
  return 0.0;
#endif
}

float peak_read(const float* data, int64_t n) {
  constexpr int kVectors = 8;
  constexpr int64_t kAhead =
      512;  // floats: hides the start of a page from the hardware's prefetcher
  VF sum[kVectors];
  for (VF& s : sum) s = set1(0.0f);
  for (int64_t i = 0; i + kVectors * kWidth <= n; i += kVectors * kWidth) {
    for (int x = 0; x < kVectors; ++x) {
      if (x * kWidth % 16 == 0) __builtin_prefetch(data + i + x * kWidth + kAhead, 0, 2);
      sum[x] = sum[x] + load(data + i + x * kWidth);
    }
  }
  for (int x = 1; x < kVectors; ++x) sum[0] = sum[0] + sum[x];
  return hsum(sum[0]);
}

TENFOLD_ISA_END
