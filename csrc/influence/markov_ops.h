// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the family share: checks. Values of order, lengths and
// rows are checked on the CPU only; elsewhere what is out of range counts as -1, and lengths are
// brought into their range.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "core/check.h"
#include "core/contiguous.h"
#include "core/tensor.h"
#include "core/types.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// float64 of float64, else float32.
ScalarType real_of(const Tensor& t);

// float32, bfloat16 or float64; else TypeError.
void check_factor_dtype(const char* op, const char* arg, const Tensor& t);

// Whether the reduction is "mean"; ValueError if it is not "sum" either.
bool check_reduction(const char* op, const std::string& reduction);

// `t` with contiguous rows, of those sizes, in the real dtype of `like` and on its device.
Tensor check_real(const char* op, const char* arg, const Tensor& t, const char* like_name,
                  const Tensor& like, std::initializer_list<int64_t> sizes, const char* layout);

struct MarkovCall {
  Tensor factors, order;  // contiguous rows; contiguous
  OptTensor lengths;      // contiguous
  int64_t lags, rows, tests, runs, steps, batch;
  bool residual, mean;
};
MarkovCall check_markov(const char* op, const Tensor& factors, const Tensor& order, bool residual,
                        const OptTensor& lengths, const std::string& reduction);

// What predictions are made from: of a scan y0 and, in a backward, what it made.
struct Past {
  OptTensor y, y0, mask;  // contiguous rows
};
Past check_scan_past(const char* op, const MarkovCall& c, const Tensor& y0, const OptTensor& pred);
Past check_recorded(const char* op, const MarkovCall& c, const Tensor& y, const OptTensor& y0,
                    const OptTensor& mask);
Tensor check_grad(const char* op, const MarkovCall& c, const Tensor& grad);

// Fresh [R, T, Q], [R, n, Q] and [0] in the real dtype, and one like the factors.
Tensor new_states(const MarkovCall& c);
Tensor new_history(const MarkovCall& c);
Tensor nothing(const MarkovCall& c);
Tensor like_factors(const MarkovCall& c);

// f<float>(), f<bf16_t>() or f<double>().
template <class F>
void with_factors(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) return f.template operator()<float>();
  if (t.scalar_type() == ScalarType::BFloat16) return f.template operator()<bf16_t>();
  f.template operator()<double>();
}

// Of a tensor that may be missing.
template <class T>
T* pointer_or_null(const OptTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}
inline int64_t stride_of(const OptTensor& t, int64_t dim) {
  return t ? t->strides()[dim] : 0;
}

}  // namespace tenfold
