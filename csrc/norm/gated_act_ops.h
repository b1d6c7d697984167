// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of swiglu and gated_gelu share: checks and outputs.
#pragma once

#include <string>

#include "norm/gated_act.h"
#include "norm/rows.h"

namespace tenfold {

struct GatedCall {
  Gate gate;
  Dtype dtype;
  RowShape shape;
  Rows a, b, out;
  bool in_place;  // out is over an input
  bool fresh;     // nobody gave it
};
// Of gated_gelu, and by number.
Gate gelu_of(const char* op, const std::string& approximate);
Gate gate_of(const char* op, int64_t act);

// out: what is written into; null: a fresh tensor.
GatedCall check_gated(const char* op, const char* a_name, const char* b_name, Gate gate,
                      const Tensor* out, const Tensor& a, const Tensor& b);

struct GatedGradCall {
  Gate gate;
  Dtype dtype;
  RowShape shape;
  Rows dout, a, b;
  Tensor da, db;  // contiguous; empty where they are not asked for
};
GatedGradCall check_gated_backward(const Tensor& grad, const Tensor& a, const Tensor& b,
                                   int64_t act, bool of_a, bool of_b);

// Rows that lie one after another in all tensors are one row.
RowShape joined_rows(RowShape shape, std::initializer_list<int64_t> strides);

}  // namespace tenfold
