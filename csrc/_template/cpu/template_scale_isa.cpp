// SPDX-License-Identifier: Apache-2.0
#include "_template/template_scale.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

template <class T>
void run(const T* x, T* y, int64_t n, VF scale) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load(x + i) * scale);
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(y + i, load_n(x + i, left) * scale, left);
  }
}

}  // namespace

void template_scale(const void* x, void* y, Dtype dtype, int64_t n, float scale) {
  const VF s = set1(scale);
  if (dtype == Dtype::f32) run(static_cast<const float*>(x), static_cast<float*>(y), n, s);
  if (dtype == Dtype::bf16) run(static_cast<const bf16_t*>(x), static_cast<bf16_t*>(y), n, s);
  if (dtype == Dtype::f16) run(static_cast<const fp16_t*>(x), static_cast<fp16_t*>(y), n, s);
}

TENFOLD_ISA_END
