// Blocks of the Gram matrix of head_cka.
#include "attention/head_cka.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

inline int lanes(int64_t left) {
  return static_cast<int>(left < kWidth ? left : kWidth);
}

template <class T>
double square_sum(const GramBlock& p) {
  double total = 0.0;
  for (int64_t i = 0; i < p.dims; ++i) {
    const T* a = static_cast<const T*>(p.a) + i * p.a_stride;
    for (int64_t j = 0; j < p.dims; ++j) {
      const T* b = static_cast<const T*>(p.b) + j * p.b_stride;
      VF sum = set1(0.0f);
      for (int64_t x = 0; x < p.length; x += kWidth) {
        const int n = lanes(p.length - x);
        sum = fma(load_n(a + x, n), load_n(b + x, n), sum);
      }
      double dot = hsum(sum);
      if (p.a_mean) dot -= static_cast<double>(p.length) * p.a_mean[i] * p.b_mean[j];
      total += dot * dot;
    }
  }
  return total;
}

template <class T>
float mean(const T* row, int64_t length) {
  VF sum = set1(0.0f);
  for (int64_t x = 0; x < length; x += kWidth) sum = sum + load_n(row + x, lanes(length - x));
  return hsum(sum) / static_cast<float>(length);
}

}  // namespace

double gram_square_sum(const GramBlock& p) {
  if (p.dtype == Dtype::f32) return square_sum<float>(p);
  if (p.dtype == Dtype::bf16) return square_sum<bf16_t>(p);
  return square_sum<fp16_t>(p);
}

float row_mean(const void* row, Dtype dtype, int64_t length) {
  if (dtype == Dtype::f32) return mean(static_cast<const float*>(row), length);
  if (dtype == Dtype::bf16) return mean(static_cast<const bf16_t*>(row), length);
  return mean(static_cast<const fp16_t*>(row), length);
}

TENFOLD_ISA_END
