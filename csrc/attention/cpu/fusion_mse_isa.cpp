// SPDX-License-Identifier: Apache-2.0
// Deviations of fusion_mse: the mean over heads first, a head after the other in order of memory,
// then the same heads again, from the second cache.
#include "attention/fusion_mse.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

inline int lanes(int64_t left) {
  return static_cast<int>(left < kWidth ? left : kWidth);
}

// f(i, number of lanes) for the vectors of a chunk.
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) f(i, kWidth);
  if (i < count) f(i, lanes(count - i));
}

inline VF get(const float* from, int n) {
  return n == kWidth ? load(from) : load_n(from, n);
}

struct Mean {
  alignas(64) float of[kFusionChunk];

  explicit Mean(const FusionChunk& c) {
    for_vectors(c.count, [&](int64_t i, int n) { store(of + i, get(c.from + i, n)); });
    for (int64_t h = 1; h < c.heads; ++h) {
      const float* const row = c.from + h * c.head_stride;
      for_vectors(c.count,
                  [&](int64_t i, int n) { store(of + i, load(of + i) + get(row + i, n)); });
    }
    const VF share = set1(1.0f / static_cast<float>(c.heads));
    for (int64_t i = 0; i < c.count; i += kWidth) store(of + i, load(of + i) * share);
  }
};
static_assert(kFusionChunk % kWidth == 0);

}  // namespace

float fusion_deviation(const FusionChunk& c) {
  const Mean mean(c);
  VF sums[2] = {set1(0.0f), set1(0.0f)};
  for (int64_t h = 0; h < c.heads; ++h) {
    const float* const row = c.from + h * c.head_stride;
    for_vectors(c.count, [&](int64_t i, int n) {  // lanes past n: 0 - 0
      const VF apart = get(row + i, n) - load(mean.of + i);
      VF& sum = sums[i / kWidth % 2];
      sum = fma(apart, apart, sum);
    });
  }
  return hsum(sums[0] + sums[1]);
}

void fusion_deviation_backward(const FusionChunk& c, float factor, float* out, bool past) {
  const Mean mean(c);
  const VF by = set1(factor);
  for (int64_t h = 0; h < c.heads; ++h) {
    const float* const row = c.from + h * c.head_stride;
    float* const to = out + h * c.head_stride;
    for_vectors(c.count, [&](int64_t i, int n) {
      const VF made = (get(row + i, n) - load(mean.of + i)) * by;
      if (n < kWidth) return store_n(to + i, made, n);
      past ? stream(to + i, made) : store(to + i, made);
    });
  }
  if (past) stream_fence();
}

TENFOLD_ISA_END
