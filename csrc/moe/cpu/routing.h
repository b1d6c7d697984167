// SPDX-License-Identifier: Apache-2.0
// From checked tensors to what the products of experts take.
#pragma once

#include <string>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "moe/cpu/grouped.h"
#include "moe/experts_ops.h"

namespace tenfold::cpu {

inline int64_t integer_at(const Tensor& t, int64_t i) {
  return t.scalar_type() == ScalarType::Long ? data_as<int64_t>(t)[i] : data_as<int32_t>(t)[i];
}

// Checks every value of index first.
inline SortedSlots sorted_slots(const char* op, const RoutedCall& c, bool allow_sentinel) {
  const int64_t slots = c.tokens * c.k;
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t e = integer_at(c.index, i);
    TENFOLD_CHECK_INDEX(e >= 0 && (e < c.experts || allow_sentinel), "tenfold::", op, ": index[",
                        i / c.k, ", ", i % c.k, "] = ", e, " is out of range for ", c.experts,
                        " experts", e < 0 ? "" : "; allow_sentinel=True skips such slots");
  }
  return sort_slots(slots, c.k, c.experts, [&](int64_t i) { return integer_at(c.index, i); });
}

// Routing weight at a position.
inline std::vector<float> sorted_weights(const RoutedCall& c, const SortedSlots& slots) {
  std::vector<float> w(slots.order.size());
  for (size_t i = 0; i < w.size(); ++i) w[i] = data_as<float>(c.weight)[slots.order[i]];
  return w;
}

inline Groups groups_of(const SortedSlots& slots) {
  return {slots.offsets.data(), static_cast<int64_t>(slots.offsets.size()) - 1};
}

// Rows of a matrix, or of tokens by position.
inline MoeRows rows_of(const Tensor& t, const SortedSlots* slots = nullptr) {
  return {t.data_ptr(), t.strides()[0], slots != nullptr ? slots->row.data() : nullptr};
}

// [n, rows, cols] or, one for all, [rows, cols]; from row `first` on.
inline Matrices matrices_of(const Tensor& t, bool by_rows, int64_t first = 0) {
  const int64_t dims = t.dim(), stride = t.strides()[dims - 2];
  const int64_t size = dtype_size(to_dtype(t.scalar_type()));
  return {static_cast<const char*>(t.data_ptr()) + first * stride * size,
          dims == 3 ? t.strides()[0] : 0, stride, by_rows};
}

// Floats that hold n elements.
inline int64_t floats_for(int64_t n, Dtype dtype) {
  return ceil_div(n * dtype_size(dtype), 4);
}

// [T, k] from partial sums at positions, `blocks` of them [S]; 0 for slots without an expert.
inline void add_weight_gradient(const SortedSlots& slots, const float* parts, int64_t blocks,
                                float* out) {
  const auto rows = static_cast<int64_t>(slots.order.size());
  for (int64_t i = 0; i < slots.routed(); ++i)
    for (int64_t b = 0; b < blocks; ++b) out[slots.order[i]] += parts[b * rows + i];
}

}  // namespace tenfold::cpu
