// SPDX-License-Identifier: Apache-2.0
// See diffusion/planes.h.
#include "core/cpu/pairs.h"
#include "diffusion/planes.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kTwo = 2 * kWidth;

template <class T>
void add(T* row, int64_t n, float number) {
  const VF by = set1(number);
  int64_t i = 0;
  for (; i + kTwo <= n; i += kTwo) {
    VF x[2];
    get_next_two<false>(row + i, x);
    for (int k = 0; k < 2; ++k) x[k] = x[k] + by;
    put_two<false>(row + i, x, false);
  }
  for (; i < n; i += kWidth) {
    const int some = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    store_n(row + i, load_n(row + i, some) + by, some);
  }
}

template <class T>
double sum(const T* row, int64_t n) {
  VF total[2] = {set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + kTwo <= n; i += kTwo) {
    VF x[2];
    get_next_two<false>(row + i, x);
    for (int k = 0; k < 2; ++k) total[k] = total[k] + x[k];
  }
  for (; i < n; i += kWidth)
    total[0] = total[0] + load_n(row + i, static_cast<int>(n - i < kWidth ? n - i : kWidth));
  return hsum(total[0] + total[1]);
}

template <class F>
inline auto with_kind(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f.template operator()<float>();
  if (dtype == Dtype::bf16) return f.template operator()<bf16_t>();
  return f.template operator()<fp16_t>();
}

}  // namespace

void add_number(Dtype dtype, void* row, int64_t n, float number) {
  with_kind(dtype, [&]<class T>() { add(static_cast<T*>(row), n, number); });
}

double sum_numbers(Dtype dtype, const void* row, int64_t n) {
  return with_kind(dtype, [&]<class T>() { return sum(static_cast<const T*>(row), n); });
}

TENFOLD_ISA_END
