// A row's tokens in their segments, for the CPU registrations of the family.
#pragma once

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "core/tensor.h"
#include "rl/returns.h"

namespace tenfold::cpu {

constexpr double kMicrosPerToken = 0.004;

// What a thread reuses from row to row. Tokens whose segment is not in [0, count) are masked.
class Row {
 public:
  Row(const Tensor& seg, int64_t count)
      : width_(seg.sizes()[1]),
        count_(count),
        wide_(seg.scalar_type() == ScalarType::Long),
        seg_(width_),
        place_(width_),
        length_(count),
        harmonic_(width_ + 1) {
    for (int64_t l = 1; l <= width_; ++l)
      harmonic_[l] = harmonic_[l - 1] + 1.0 / static_cast<double>(l);
  }

  void read(const void* seg, int64_t row) {
    std::fill(length_.begin(), length_.end(), 0);
    for (int64_t j = 0; j < width_; ++j) {
      const int64_t at = row * width_ + j;
      const int64_t s =
          wide_ ? static_cast<const int64_t*>(seg)[at] : static_cast<const int32_t*>(seg)[at];
      seg_[j] = s >= 0 && s < count_ ? static_cast<int32_t>(s) : -1;
      if (seg_[j] >= 0) place_[j] = length_[seg_[j]]++;
    }
  }

  int64_t width() const { return width_; }
  int32_t segment(int64_t j) const { return seg_[j]; }
  int32_t place(int64_t j) const { return place_[j]; }
  const int32_t* lengths() const { return length_.data(); }
  double weight(PoolBy by, int64_t j) const {
    const int64_t l = length_[seg_[j]];
    return pool_weight(by, place_[j], l, harmonic_[l]);
  }

 private:
  int64_t width_, count_;
  bool wide_;
  std::vector<int32_t> seg_, place_, length_;
  std::vector<double> harmonic_;
};

// f(b, row) for every row of seg [B, R].
template <class F>
void over_rows(const Tensor& seg, int64_t count, const F& f) {
  const void* data = seg.data_ptr();
  parallel_for(seg.sizes()[0], kMicrosPerToken * static_cast<double>(seg.sizes()[1] + 1),
               [&](int64_t begin, int64_t end) {
                 Row row(seg, count);
                 for (int64_t b = begin; b < end; ++b) {
                   row.read(data, b);
                   f(b, row);
                 }
               });
}

// f<T>() for float32 or float64.
template <class F>
void with_real(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  f.template operator()<float>();
}

}  // namespace tenfold::cpu
