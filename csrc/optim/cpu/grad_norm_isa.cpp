// SPDX-License-Identifier: Apache-2.0
#include "optim/cpu/mask_runs.h"
#include "optim/grad_norm.h"

TENFOLD_ISA_BEGIN
namespace {

// Independent sums, so that one addition need not wait for the one before; moved to float64 before
// they are long, because rounding a growing sum of squares of few bits is biased.
class SquareSum {
 public:
  void add(int lane, VF x) { sum_[lane] = fma(x, x, sum_[lane]); }
  void next() {  // after an addition or two to each
    if (++added_ < kMostAdded) return;
    fold();
  }
  double total() {
    fold();
    return total_;
  }

 private:
  static constexpr int kMostAdded = 16;

  void fold() {
    total_ += hsum((sum_[0] + sum_[1]) + (sum_[2] + sum_[3]));
    for (VF& s : sum_) s = set1(0.0f);
    added_ = 0;
  }

  VF sum_[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  double total_ = 0.0;
  int added_ = 0;
};

template <class T>
void add_dense(const T* g, int64_t n, SquareSum* sum) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    sum->add(0, load(g + i));
    sum->add(1, load(g + i + kWidth));
    sum->add(2, load(g + i + 2 * kWidth));
    sum->add(3, load(g + i + 3 * kWidth));
    sum->next();
  }
  for (; i < n; i += kWidth) {
    sum->add(0, load_n(g + i, static_cast<int>(n - i < kWidth ? n - i : kWidth)));
    sum->next();
  }
}

template <class T>
void add_masked(const T* g, const uint8_t* bits, int64_t first, int64_t last, int64_t bit,
                SquareSum* sum) {
  const VF zero = set1(0.0f);
  const auto group = [&](int64_t i, uint64_t word) {
    for (int k = 0; k < 4; ++k)
      sum->add(k, select(lanes_of(static_cast<uint32_t>(word >> (k * kWidth))),
                         load(g + i + k * kWidth), zero));
    sum->next();
  };
  const auto few = [&](int64_t i, uint32_t word, int n) {
    for (int k = 0; k < n; k += kWidth)
      sum->add(
          0, select(lanes_of(word >> k), load_n(g + i + k, n - k < kWidth ? n - k : kWidth), zero));
    sum->next();
  };
  cut_masked<4 * kWidth>(bits, first, last, bit, group, few);
}

template <class T>
double square_sum(const T* g, const Mask& mask, int64_t begin, int64_t end) {
  SquareSum sum;
  visit_trained(
      mask, begin, end,
      [&](int64_t first, int64_t last) { add_dense(g + first, last - first, &sum); },
      [&](int64_t first, int64_t last, int64_t bit) {
        add_masked(g, mask.bits, first, last, bit, &sum);
      });
  return sum.total();
}

}  // namespace

double grad_square_sum(const void* grad, Dtype dtype, const Mask& mask, int64_t begin,
                       int64_t end) {
  if (dtype == Dtype::f32) return square_sum(static_cast<const float*>(grad), mask, begin, end);
  if (dtype == Dtype::bf16) return square_sum(static_cast<const bf16_t*>(grad), mask, begin, end);
  return square_sum(static_cast<const fp16_t*>(grad), mask, begin, end);
}

TENFOLD_ISA_END
