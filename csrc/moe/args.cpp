// SPDX-License-Identifier: Apache-2.0
#include "moe/args.h"

#include <algorithm>
#include <utility>

namespace tenfold {
namespace {

template <class Int>
void check_values(const char* op, const char* arg, const Int* data, int64_t n, int64_t low,
                  int64_t limit) {
  bool wrong = false;
  for (int64_t i = 0; i < n; ++i) wrong |= data[i] < low || data[i] >= limit;
  if (!wrong) [[likely]]
    return;
  const Int* const at = std::find_if(data, data + n, [&](Int x) { return x < low || x >= limit; });
  raise(ErrorKind::index, "tenfold::", op, ": ", arg, " must be in [", low, ", ", limit, "), got ",
        *at, " at position ", at - data);
}

}  // namespace

void check_index_dtype(const char* op, const char* arg, const Tensor& t) {
  const auto s = t.scalar_type();
  TENFOLD_CHECK_INDEX(s == ScalarType::Int || s == ScalarType::Long, "tenfold::", op, ": ", arg,
                      " must be int32 or int64, got ", dtype_name(s));
}

void check_place(const char* op, const char* arg, const Tensor& t, const char* like_name,
                 const Tensor& like) {
  if (t.device() == like.device()) return;
  raise(ErrorKind::runtime, "tenfold::", op, ": ", arg, " must be on the device of ", like_name,
        " (", device_str(like), "), got ", device_str(t));
}

void check_fits(const char* op, const char* arg, const Tensor& t,
                std::initializer_list<int64_t> want, const char* layout, const char* like_name,
                const Tensor& like) {
  const auto sizes = t.sizes();
  if (t.dim() == static_cast<int64_t>(want.size()) &&
      std::equal(want.begin(), want.end(), sizes.begin()))
    return;
  raise(ErrorKind::runtime, "tenfold::", op, ": ", arg, " must be ", layout, " to match ",
        like_name, " ", shape_str(like), ", got ", shape_str(t));
}

void check_k(const char* op, int64_t k, int64_t experts) {
  TENFOLD_CHECK_VALUE(k >= 1 && k <= experts, "tenfold::", op,
                      ": k must be at least 1 and at most the number of experts, got k = ", k,
                      " for ", experts, " experts");
}

void check_float32(const char* op, const char* arg, const Tensor& t) {
  TENFOLD_CHECK_TYPE(t.scalar_type() == ScalarType::Float, "tenfold::", op, ": ", arg,
                     " must be float32, got ", dtype_name(t.scalar_type()));
}

IndexList check_index_values(const char* op, const char* arg, const Tensor& t, int64_t low,
                             int64_t limit) {
  check_index_dtype(op, arg, t);
  IndexList list{as_contiguous(t), {}, nullptr};
  if (!t.is_cpu()) return list;
  const int64_t n = t.numel();
  if (t.scalar_type() == ScalarType::Int) {
    list.data = data_as<int32_t>(list.kept);
    check_values(op, arg, list.data, n, low, limit);
    return list;
  }
  const auto* const wide = data_as<int64_t>(list.kept);
  check_values(op, arg, wide, n, low, limit);
  list.copy.resize(n);
  for (int64_t i = 0; i < n; ++i) list.copy[i] = static_cast<int32_t>(wide[i]);
  list.data = list.copy.data();
  return list;
}

}  // namespace tenfold
