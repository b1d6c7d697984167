// SPDX-License-Identifier: Apache-2.0
#include "norm/rows.h"

namespace tenfold {
namespace {

// The distance of rows, if they are contiguous and all one distance apart.
bool in_rows(const Tensor& t, RowShape shape, int64_t* stride) {
  *stride = shape.cols;
  if (t.is_contiguous() || shape.rows * shape.cols == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t last = t.dim() - 1;
  if (shape.cols > 1 && strides[last] != 1) return false;
  int64_t next = -1;  // what the stride of the next dimension must be
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (next == -1) {
      *stride = strides[i];
    } else if (strides[i] != next) {
      return false;
    }
    next = strides[i] * sizes[i];
  }
  return true;
}

Rows rows_at(const Tensor& t, int64_t stride) {
  return {t, t.data_ptr(), stride};
}

}  // namespace

RowShape row_shape(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto last = static_cast<int64_t>(sizes.size()) - 1;
  int64_t rows = 1;
  for (int64_t i = 0; i < last; ++i) rows *= sizes[i];
  return {rows, sizes[last]};
}

Rows readable_rows(const Tensor& t, RowShape shape) {
  int64_t stride;
  if (in_rows(t, shape, &stride)) return rows_at(t, stride);
  return rows_at(torch::stable::contiguous(t), shape.cols);
}

Rows writable_rows(const char* op, const char* arg, const Tensor& t, RowShape shape) {
  int64_t stride;
  TENFOLD_CHECK_VALUE(in_rows(t, shape, &stride) && (shape.rows <= 1 || stride >= shape.cols),
                      "tenfold::", op, ": ", arg,
                      " is written in place and must be rows of contiguous elements, equally far "
                      "apart; pass a .contiguous() tensor");
  return rows_at(t, stride);
}

Rows new_rows(const Tensor& like, ScalarType dtype, RowShape shape) {
  return rows_at(new_output(like, like.sizes(), dtype), shape.cols);
}

void check_apart(const char* op, const char* written, const Rows& a, const char* other,
                 const Rows& b, RowShape shape, bool same) {
  if (shape.rows == 0 || shape.cols == 0) return;
  const int64_t size_a = a.t.element_size(), size_b = b.t.element_size();
  const auto bytes = [&](const Rows& r, int64_t size) {
    return ((shape.rows - 1) * r.stride + shape.cols) * size;
  };
  const auto at = reinterpret_cast<intptr_t>(a.data), to = reinterpret_cast<intptr_t>(b.data);
  if (at + bytes(a, size_a) <= to || to + bytes(b, size_b) <= at) return;
  const int64_t step = a.stride * size_a;
  const bool one_step = shape.rows == 1 || step == b.stride * size_b;
  if (same && at == to && one_step && size_a == size_b) return;
  // Columns of one buffer, next to each other.
  if (one_step && shape.rows > 1 && step > 0) {
    const int64_t ahead = ((to - at) % step + step) % step;
    if (ahead >= shape.cols * size_a && ahead + shape.cols * size_b <= step) return;
  }
  raise(ErrorKind::value, "tenfold::", op, ": ", written, " shares memory with ", other,
        same ? "; it may be the same tensor, or one that does not overlap it"
             : ", which it must not");
}

void check_has_rows(const char* op, const char* arg, const Tensor& t) {
  TENFOLD_CHECK_VALUE(t.dim() >= 1, "tenfold::", op, ": ", arg,
                      " must have at least one dimension, got a 0-d tensor");
}

void check_like(const char* op, const char* of_name, const Tensor& of, const char* arg,
                const Tensor& t) {
  TENFOLD_CHECK_VALUE(same_sizes(of, t), "tenfold::", op, ": ", arg, " must have the shape of ",
                      of_name, " = ", shape_str(of), ", got ", shape_str(t));
  if (!of.is_cpu() || !t.is_cpu()) check_same_device(op, of_name, of, arg, t);
}

}  // namespace tenfold
