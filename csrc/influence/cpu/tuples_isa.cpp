// SPDX-License-Identifier: Apache-2.0
// See influence/tuples.h.
#include "influence/cpu/lanes.h"
#include "influence/tuples.h"

TENFOLD_ISA_BEGIN
namespace {

// hist at lag `plane` + 1.
template <class T>
inline Real<T> past_of(const TupleSteps<T>& s, int64_t k, int64_t plane) {
  return s.hist[k * s.hist_row + s.lags - 1 - plane];
}

// Product of a test example's row with the sum of a batch's, in columns [at, at + lanes).
template <class T, int kCount>
[[gnu::always_inline]] inline void add_products(const T* h, int64_t stride, const int32_t* ids,
                                                int64_t batch, const T* g, int tail,
                                                typename VectorOf<T>::type* sum) {
  using L = Lanes<T, kCount>;
  const L x = sum_rows<T, kCount>(h, stride, ids, batch, tail) * L::read(g, tail);
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) *sum = *sum + x.x[v];
}

// alpha of lag plane + 1, or beta.
template <class T>
Real<T> factor_of(const TupleSteps<T>& s, int64_t k, int64_t plane, Real<T> weight) {
  const int32_t* const ids = s.ids + k * s.batch;
  const T* const h = s.h + plane * s.h_plane;
  const T* const g = s.g + plane * s.g_plane + s.tests[k] * s.g_row;
  auto sum = VectorOf<T>::of(Real<T>{0});
  over_lanes(s.dim, [&]<int kCount>(int64_t at, int tail) {
    add_products<T, kCount>(h + at, s.h_row, ids, s.batch, g + at, tail, &sum);
  });
  const Real<T> factor = s.mean ? hsum(sum) * weight : hsum(sum);
  return plane == 0 && s.residual ? factor + Real<T>{1} : factor;
}

template <class T>
void forward(const TupleForward<T>& p, int64_t begin, int64_t end) {
  const TupleSteps<T>& s = p.s;
  for (int64_t k = begin; k < end; ++k) {
    const Real<T> weight = batch_weight<T>(s.ids + k * s.batch, s.batch, s.mean);
    if (p.grad_hist != nullptr) {
      for (int64_t plane = 0; plane < s.lags; ++plane)
        p.grad_hist[k * s.lags + s.lags - 1 - plane] = p.grad[k] * factor_of(s, k, plane, weight);
      continue;
    }
    Real<T> y = factor_of(s, k, s.lags, weight);
    for (int64_t plane = 0; plane < s.lags; ++plane)
      y += factor_of(s, k, plane, weight) * past_of(s, k, plane);
    p.pred[k] = y;
  }
}

template <class T, int kCount>
void backward(const TupleBackward<T>& p, int64_t at, int tail) {
  using L = Lanes<T, kCount>;
  const TupleSteps<T>& s = p.s;
  const T* const h = s.h + p.plane * s.h_plane + p.at + at;
  const T* const g = s.g + p.plane * s.g_plane + p.at + at;
  for (int64_t k = 0; k < p.count; ++k) {
    const int32_t* const ids = s.ids + k * s.batch;
    Real<T> c = p.grad[k];
    if (p.plane < s.lags) c *= past_of(s, k, p.plane);
    if (s.mean) c *= batch_weight<T>(ids, s.batch, true);
    const L share = L::all(c);
    const int64_t test = s.tests[k];
    if (p.g_sums != nullptr)
      add_to<T, kCount>(p.g_sums + test * p.g_stride + at,
                        share * sum_rows<T, kCount>(h, s.h_row, ids, s.batch, tail), tail);
    if (p.h_sums == nullptr) continue;
    const L x = share * L::read(g + test * s.g_row, tail);
    for (int64_t b = 0; b < s.batch; ++b)
      if (ids[b] >= 0) add_to<T, kCount>(p.h_sums + ids[b] * p.h_stride + at, x, tail);
  }
}

}  // namespace

#define TENFOLD_TUPLES(T)                                                                    \
  void tuples_forward(const TupleForward<T>& p, int64_t begin, int64_t end) {                \
    forward(p, begin, end);                                                                  \
  }                                                                                          \
  void tuples_backward(const TupleBackward<T>& p) {                                          \
    over_lanes(p.lanes,                                                                      \
               [&]<int kCount>(int64_t at, int tail) { backward<T, kCount>(p, at, tail); }); \
  }
TENFOLD_TUPLES(float)
TENFOLD_TUPLES(bf16_t)
TENFOLD_TUPLES(double)
#undef TENFOLD_TUPLES

TENFOLD_ISA_END
