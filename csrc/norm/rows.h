// SPDX-License-Identifier: Apache-2.0
// Tensors [..., n] as rows of contiguous elements, any stride apart: a half of a [..., 2 n] tensor
// is read where it lies.
#pragma once

#include "core/check.h"
#include "core/tensor.h"

namespace tenfold {

struct Rows {
  Tensor t;
  void* data = nullptr;
  int64_t stride = 0;  // elements between rows
};

// How many rows, and how long: of a tensor with at least one dimension. (What a tensor says about
// itself takes a few calls each time, which a small op feels: it is asked once.)
struct RowShape {
  int64_t rows, cols;
};
RowShape row_shape(const Tensor& t);

// To be read: `t` itself, or a contiguous copy where it does not lie in rows.
Rows readable_rows(const Tensor& t, RowShape shape);

// To be written: ValueError where it does not lie in rows, or rows share memory.
Rows writable_rows(const char* op, const char* arg, const Tensor& t, RowShape shape);

// Fresh and contiguous, of the sizes of `like`.
Rows new_rows(const Tensor& like, ScalarType dtype, RowShape shape);

// What is written must be either exactly where the other is, unless !same, or apart from it.
void check_apart(const char* op, const char* written, const Rows& a, const char* other,
                 const Rows& b, RowShape shape, bool same = true);

// At least one dimension.
void check_has_rows(const char* op, const char* arg, const Tensor& t);

// The sizes and the device of another argument.
void check_like(const char* op, const char* of_name, const Tensor& of, const char* arg,
                const Tensor& t);

}  // namespace tenfold
