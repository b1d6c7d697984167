// SPDX-License-Identifier: Apache-2.0
// Rotates one key row (rotate-half RoPE): both halves are read before either is written.
#include "attention/dha_cache_append.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

template <class T, class A>
void rotate(const RotateRow& r) {
  const T* k = static_cast<const T*>(r.k);
  const A *cos = static_cast<const A*>(r.cos), *sin = static_cast<const A*>(r.sin);
  T* to = static_cast<T*>(r.to);
  const int64_t half = r.head_dim / 2;
  for (int64_t i = 0; i < half; i += kWidth) {
    const int n = static_cast<int>(half - i < kWidth ? half - i : kWidth);
    const VF x1 = load_n(k + i, n), x2 = load_n(k + half + i, n);
    const VF s1 = load_n(sin + i, n), s2 = load_n(sin + half + i, n);
    const VF y1 = fma(x1, load_n(cos + i, n), set1(0.0f) - x2 * s1);
    const VF y2 = fma(x2, load_n(cos + half + i, n), x1 * s2);
    store_n(to + i, y1, n);
    store_n(to + half + i, y2, n);
  }
}

template <class T>
void rotate_by(const RotateRow& r) {
  if (r.angle_dtype == Dtype::f32) return rotate<T, float>(r);
  if (r.angle_dtype == Dtype::bf16) return rotate<T, bf16_t>(r);
  rotate<T, fp16_t>(r);
}

}  // namespace

void rotate_row(const RotateRow& r) {
  if (r.dtype == Dtype::f32) return rotate_by<float>(r);
  if (r.dtype == Dtype::bf16) return rotate_by<bf16_t>(r);
  rotate_by<fp16_t>(r);
}

TENFOLD_ISA_END
