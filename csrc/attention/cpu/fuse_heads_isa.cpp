// Row mixing and row products of fuse_heads.
#include "attention/fuse_heads.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

template <class T>
void mix(const MixRows& p) {
  for (int64_t o = 0; o < p.num_out; ++o) {
    T* to = static_cast<T*>(p.to[o]);
    for (int64_t x = 0; x < p.length; x += kWidth) {
      const int n = static_cast<int>(p.length - x < kWidth ? p.length - x : kWidth);
      VF sum = set1(0.0f);
      for (int64_t i = 0; i < p.num_in; ++i)
        sum = fma(set1(p.coef[i * p.coef_pitch + o]),
                  load_n(static_cast<const T*>(p.from[i]) + x, n), sum);
      store_n(to + x, sum, n);
    }
  }
}

template <class T>
void dots(const RowDots& p) {
  for (int64_t i = 0; i < p.num_a; ++i)
    for (int64_t j = 0; j < p.num_b; ++j) {
      VF sum = set1(0.0f);
      for (int64_t x = 0; x < p.length; x += kWidth) {
        const int n = static_cast<int>(p.length - x < kWidth ? p.length - x : kWidth);
        sum = fma(load_n(static_cast<const T*>(p.a[i]) + x, n),
                  load_n(static_cast<const T*>(p.b[j]) + x, n), sum);
      }
      p.dots[i * p.num_b + j] = hsum(sum);
    }
}

}  // namespace

void mix_rows(const MixRows& p) {
  if (p.dtype == Dtype::f32) mix<float>(p);
  if (p.dtype == Dtype::bf16) mix<bf16_t>(p);
  if (p.dtype == Dtype::f16) mix<fp16_t>(p);
}

void row_dots(const RowDots& p) {
  if (p.dtype == Dtype::f32) dots<float>(p);
  if (p.dtype == Dtype::bf16) dots<bf16_t>(p);
  if (p.dtype == Dtype::f16) dots<fp16_t>(p);
}

TENFOLD_ISA_END
