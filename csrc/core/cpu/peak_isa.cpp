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
#if defined(TENFOLD_ISA_BF16)
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

TENFOLD_ISA_END
