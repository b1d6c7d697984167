// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/vec.h"
#include "moe/slots.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kVecs = 4;

template <class T>
inline VF load_first(const T* p, int n) {
  return n >= kWidth ? load(p) : load_n(p, n);
}

template <class T>
inline void store_first(T* p, VF a, int n) {
  if (n >= kWidth) return store_quick(p, a);
  store_n(p, a, n);
}

// V vectors of columns; the last may have fewer.
template <int V, class T>
inline void sum_columns(const void* const* rows, const float* weight, int64_t count, int64_t col,
                        int left, T* out) {
  VF sum[V];
  for (int v = 0; v < V; ++v) sum[v] = set1(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    const T* const row = static_cast<const T*>(rows[j]) + col;
    const VF w = set1(weight != nullptr ? weight[j] : 1.0f);
    for (int v = 0; v < V; ++v)
      sum[v] = fma(w, load_first(row + v * kWidth, V > 1 ? kWidth : left), sum[v]);
  }
  for (int v = 0; v < V; ++v) store_first(out + col + v * kWidth, sum[v], V > 1 ? kWidth : left);
}

template <class T>
void sum_of(const void* const* rows, const float* weight, int64_t count, int64_t d, T* out) {
  int64_t c = 0;
  for (; c + kVecs * kWidth <= d; c += kVecs * kWidth)
    sum_columns<kVecs>(rows, weight, count, c, kWidth, out);
  for (; c < d; c += kWidth)
    sum_columns<1>(rows, weight, count, c, static_cast<int>(d - c < kWidth ? d - c : kWidth), out);
}

template <class T>
float grad_of(const T* grad, const T* y, float weight, int64_t d, T* out) {
  const VF w = set1(weight);
  VF sum[kVecs];
  for (auto& s : sum) s = set1(0.0f);
  const auto step = [&](int v, int64_t c, int left) {
    const VF g = load_first(grad + c, left);
    if (y != nullptr) sum[v] = fma(g, load_first(y + c, left), sum[v]);
    if (out != nullptr) store_first(out + c, w * g, left);
  };
  int64_t c = 0;
  for (; c + kVecs * kWidth <= d; c += kVecs * kWidth)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) step(v, c + v * kWidth, kWidth);
  for (; c < d; c += kWidth) step(0, c, static_cast<int>(d - c < kWidth ? d - c : kWidth));
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace

void sum_slots(const void* const* rows, const float* weight, int64_t count, Dtype dtype, int64_t d,
               void* out) {
  if (dtype == Dtype::f32) return sum_of(rows, weight, count, d, static_cast<float*>(out));
  if (dtype == Dtype::bf16) return sum_of(rows, weight, count, d, static_cast<bf16_t*>(out));
  sum_of(rows, weight, count, d, static_cast<fp16_t*>(out));
}

float slot_grad(const void* grad_out, const void* y, float weight, Dtype dtype, int64_t d,
                void* grad_y) {
  const auto run = [&]<class T>(T* out) {
    return grad_of(static_cast<const T*>(grad_out), static_cast<const T*>(y), weight, d, out);
  };
  if (dtype == Dtype::f32) return run(static_cast<float*>(grad_y));
  if (dtype == Dtype::bf16) return run(static_cast<bf16_t*>(grad_y));
  return run(static_cast<fp16_t*>(grad_y));
}

TENFOLD_ISA_END
