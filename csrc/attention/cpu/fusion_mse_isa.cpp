// SPDX-License-Identifier: Apache-2.0
// Deviations of fusion_mse: vectors along the dims, all heads of a row of omega while it is in L1.
#include "attention/fusion_mse.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

inline VF mean_of(const float* at, int64_t stride, int64_t heads, int n, VF factor) {
  VF sum = set1(0.0f);
  for (int64_t h = 0; h < heads; ++h) sum = sum + load_n(at + h * stride, n);
  return sum * factor;
}

inline int lanes(int64_t left) {
  return static_cast<int>(left < kWidth ? left : kWidth);
}

}  // namespace

float fusion_deviation(const float* row, int64_t head_stride, int64_t heads, int64_t dims) {
  const VF factor = set1(1.0f / static_cast<float>(heads));
  VF sum = set1(0.0f);
  for (int64_t i = 0; i < dims; i += kWidth) {
    const int n = lanes(dims - i);
    const VF mean = mean_of(row + i, head_stride, heads, n, factor);
    for (int64_t h = 0; h < heads; ++h) {
      const VF apart = load_n(row + i + h * head_stride, n) - mean;
      sum = fma(apart, apart, sum);  // lanes past n: 0 - 0
    }
  }
  return hsum(sum);
}

void fusion_deviation_backward(const float* row, float* out, int64_t head_stride, int64_t heads,
                               int64_t dims, float factor) {
  const VF share = set1(1.0f / static_cast<float>(heads)), by = set1(factor);
  for (int64_t i = 0; i < dims; i += kWidth) {
    const int n = lanes(dims - i);
    const VF mean = mean_of(row + i, head_stride, heads, n, share);
    for (int64_t h = 0; h < heads; ++h)
      store_n(out + i + h * head_stride, (load_n(row + i + h * head_stride, n) - mean) * by, n);
  }
}

TENFOLD_ISA_END
