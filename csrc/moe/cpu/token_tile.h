// Logits of kGateTokens tokens, transposed: tile[expert][token], lanes hold tokens. For ISA
// sources.
#pragma once

#include "core/cpu/panels.h"
#include "moe/gate.h"

TENFOLD_ISA_BEGIN
namespace {

// Sums over experts are sums of as many: one long chain of additions would round each.
constexpr int64_t kSumBlock = 8;

// Of `rows` tokens; those beyond are 0. staged: room for 8 rows of round_up(n, 8), tile for that
// many of kGateTokens.
template <class T>
inline void load_tile(const T* from, int64_t stride, int64_t rows, int64_t n, float* staged,
                      float* tile) {
  int64_t pitch;
  for (int64_t r = 0; r < kGateTokens; r += 8) {
    const float* const eight = stage8<T, false>(from, stride, r, rows, n, staged, &pitch);
    for (int64_t e = 0; e < n; e += 8)
      transpose8(eight + e, pitch, tile + e * kGateTokens + r, kGateTokens);
  }
}

// f(element type) with the rows from `row` on.
template <class F>
inline void with_rows(const void* rows, Dtype dtype, int64_t stride, int64_t row, const F& f) {
  if (dtype == Dtype::f32) return f(static_cast<const float*>(rows) + row * stride);
  if (dtype == Dtype::bf16) return f(static_cast<const bf16_t*>(rows) + row * stride);
  f(static_cast<const fp16_t*>(rows) + row * stride);
}

// Of every token the largest logit, 1 / the sum of exp(x - largest), and the mean of `of` over the
// experts' probabilities (unless null). NaN where the softmax is.
struct TileSoftmax {
  float *largest, *factor, *mean;
};

inline void tile_softmax(const float* tile, int64_t n, const float* of, const TileSoftmax& to) {
  for (int64_t g = 0; g < kGateTokens; g += kWidth) {
    VF top = load(tile + g);
    for (int64_t e = 1; e < n; ++e) top = vmax(top, load(tile + e * kGateTokens + g));
    VF sum = set1(0.0f), mean = set1(0.0f);
    for (int64_t first = 0; first < n; first += kSumBlock) {
      const int64_t end = first + kSumBlock < n ? first + kSumBlock : n;
      VF some = set1(0.0f), some_mean = set1(0.0f);
      for (int64_t e = first; e < end; ++e) {
        const VF y = exp(load(tile + e * kGateTokens + g) - top);
        some = some + y;
        if (of != nullptr) some_mean = fma(y, set1(of[e]), some_mean);
      }
      sum = sum + some;
      mean = mean + some_mean;
    }
    const VF factor = set1(1.0f) / sum;
    store(to.largest + g, top);
    store(to.factor + g, factor);
    if (of != nullptr) store(to.mean + g, mean * factor);
  }
}

}  // namespace
TENFOLD_ISA_END
