#include "core/cpu/pairs.h"
#include "merge/cpu/end_products.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kStrip = 512;  // elements whose products are summed in float32

struct Products {
  VF xx, xy, yy;

  Products() : xx(set1(0.0f)), xy(set1(0.0f)), yy(set1(0.0f)) {}
  void add(VF x, VF y) {
    xx = fma(x, x, xx);
    xy = fma(x, y, xy);
    yy = fma(y, y, yy);
  }
};

inline double total(VF a, VF b) {
  float lanes[2][kWidth];
  store(lanes[0], a);
  store(lanes[1], b);
  double sum = 0.0;
  for (int i = 0; i < kWidth; ++i) sum += static_cast<double>(lanes[0][i]) + lanes[1][i];
  return sum;
}

template <class T>
void add_strip(const T* x, const T* y, int64_t n, double* sums) {
  Products p[2];
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    VF a[2], b[2];
    get_next_two<false>(x + i, a);
    get_next_two<false>(y + i, b);
    for (int k = 0; k < 2; ++k) p[k].add(a[k], b[k]);
  }
  for (; i < n; i += kWidth) {
    const int left = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    p[0].add(load_n(x + i, left), load_n(y + i, left));
  }
  sums[0] += total(p[0].xx, p[1].xx);
  sums[1] += total(p[0].xy, p[1].xy);
  sums[2] += total(p[0].yy, p[1].yy);
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
