// SPDX-License-Identifier: Apache-2.0
// Logits of kGateTokens tokens, transposed: tile[expert][token], lanes hold tokens. For ISA
// sources.
#pragma once

#include "core/cpu/panels.h"
#include "moe/gate.h"

TENFOLD_ISA_BEGIN
namespace {

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

constexpr int64_t kSumBlock = 8;

// Over experts [begin, end) of a group of lanes, the sum of y = exp(x - top), and of y `of` (unless
// null); halves are added, so that few roundings follow each other.
struct ExpSums {
  VF sum, mean;
};

inline ExpSums exp_sums(const float* lanes, int64_t begin, int64_t end, VF top, const float* of) {
  ExpSums s{set1(0.0f), set1(0.0f)};
  if (end - begin > kSumBlock) {
    const int64_t half = begin + round_up((end - begin) / 2, kSumBlock);
    const ExpSums a = exp_sums(lanes, begin, half, top, of);
    const ExpSums b = exp_sums(lanes, half, end, top, of);
    return {a.sum + b.sum, a.mean + b.mean};
  }
  for (int64_t e = begin; e < end; e += 2) {
    const VF y = exp(load(lanes + e * kGateTokens) - top);
    const VF z = e + 1 < end ? exp(load(lanes + (e + 1) * kGateTokens) - top) : set1(0.0f);
    s.sum = s.sum + (y + z);
    if (of == nullptr) continue;
    s.mean = s.mean + fma(y, set1(of[e]), e + 1 < end ? z * set1(of[e + 1]) : z);
  }
  return s;
}

inline void tile_softmax(const float* tile, int64_t n, const float* of, const TileSoftmax& to) {
  for (int64_t g = 0; g < kGateTokens; g += kWidth) {
    VF top = load(tile + g);
    for (int64_t e = 1; e < n; ++e) top = vmax(top, load(tile + e * kGateTokens + g));
    const ExpSums s = exp_sums(tile + g, 0, n, top, of);
    const VF factor = set1(1.0f) / s.sum;
    store(to.largest + g, top);
    store(to.factor + g, factor);
    if (of != nullptr) store(to.mean + g, s.mean * factor);
  }
}

}  // namespace
TENFOLD_ISA_END
