// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of moe_sort, moe_permute and moe_combine share: checked
// calls.
#pragma once

#include "core/dispatch.h"
#include "moe/args.h"

namespace tenfold {

// With its outputs; the values of the index are checked by the CPU kernel, which reads them anyway.
struct SortCall {
  Tensor index;  // contiguous, int32 or int64
  int64_t slots, experts;
  bool allow_sentinel;
  Tensor order, inverse, counts, offsets;
};

SortCall check_sort(const Tensor& index, int64_t num_experts, bool allow_sentinel);

// Rows to positions: y [P, d] of x [T, d]. Values of order are in [-1, T k).
struct PermuteCall {
  Tensor x;  // with contiguous rows
  IndexList order;
  int64_t positions, tokens, k, dim;
};

PermuteCall check_permute(const char* op, const char* arg, const Tensor& x, const Tensor& order,
                          int64_t k, int64_t tokens);

// Values of inverse are in [-1, P) of y [P, d].
struct CombineCall {
  Tensor y, weight;  // with contiguous rows; float32 [T, k], contiguous
  IndexList inverse;
  int64_t tokens, k, dim;
};

CombineCall check_combine(const char* op, const Tensor& y, const Tensor& weight,
                          const Tensor& inverse);

// The gradient of the combined rows, of the call with that y and weight; with contiguous rows.
Tensor check_combine_grad(const char* op, const Tensor& grad, const CombineCall& c, const Tensor& y,
                          const Tensor& weight);

}  // namespace tenfold
