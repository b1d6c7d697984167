// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/pairs.h"
#include "merge/cpu/end_products.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kStrip = 512;  // elements whose products are summed in float32
// Sums of a strip, whatever a vector's width: one result on every ISA.
constexpr int64_t kLanes = 32;
constexpr int kVecs = static_cast<int>(kLanes / kWidth);

template <class T>
struct Sums {
  VF of[3][kVecs];

  Sums() {
    for (auto& product : of)
      for (VF& lanes : product) lanes = set1(0.0f);
  }

  // kLanes elements.
  void add(const T* x, const T* y) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v += 2) {
      VF a[2], b[2];
      get_two<false>(x + v * kWidth, a);
      get_two<false>(y + v * kWidth, b);
      for (int k = 0; k < 2; ++k) {
        of[0][v + k] = fused(a[k], a[k], of[0][v + k]);
        of[1][v + k] = fused(a[k], b[k], of[1][v + k]);
        of[2][v + k] = fused(b[k], b[k], of[2][v + k]);
      }
    }
  }

  double total(int product) const {
    float lanes[kLanes];
    for (int v = 0; v < kVecs; ++v) store(lanes + v * kWidth, of[product][v]);
    double sum = 0.0;  // in the order of the elements
    for (int i = 0; i < kLanes; ++i) {
      const int two = i / (2 * kWidth) * (2 * kWidth), at = i - two;
      sum += static_cast<double>(lanes[kSplit<T> ? two + at % 2 * kWidth + at / 2 : i]);
    }
    return sum;
  }
};

template <class T>
void add_strip(const T* x, const T* y, int64_t n, double* sums) {
  Sums<T> s;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    read_ahead<kLanes>(x + i);
    read_ahead<kLanes>(y + i);
    s.add(x + i, y + i);
  }
  if (i < n) {
    T last[2][kLanes] = {};
    __builtin_memcpy(last[0], x + i, static_cast<uint64_t>(n - i) * sizeof(T));
    __builtin_memcpy(last[1], y + i, static_cast<uint64_t>(n - i) * sizeof(T));
    s.add(last[0], last[1]);
  }
  for (int product = 0; product < 3; ++product) sums[product] += s.total(product);
}

template <class T>
void add_all(const void* x, const void* y, int64_t begin, int64_t end, double* sums) {
  for (int64_t i = begin; i < end; i += kStrip)
    add_strip(static_cast<const T*>(x) + i, static_cast<const T*>(y) + i,
              end - i < kStrip ? end - i : kStrip, sums);
}

}  // namespace

void end_products(const void* x, const void* y, Dtype dtype, int64_t begin, int64_t end,
                  double* sums) {
  if (dtype == Dtype::bf16) return add_all<bf16_t>(x, y, begin, end, sums);
  add_all<fp16_t>(x, y, begin, end, sums);
}

TENFOLD_ISA_END
