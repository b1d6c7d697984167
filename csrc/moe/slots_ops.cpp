// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of moe_sort, moe_permute and moe_combine.
#include "moe/slots_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {
namespace {

void check_count(const char* op, const char* what, int64_t n) {
  TENFOLD_CHECK_VALUE(n < INT32_MAX, "tenfold::", op, ": ", what,
                      " must be fewer than 2^31 - 1, got ", n);
}

}  // namespace

SortCall check_sort(const Tensor& index, int64_t num_experts, bool allow_sentinel) {
  constexpr auto kOp = "moe_sort";
  check_index_dtype(kOp, "index", index);
  TENFOLD_CHECK_VALUE(num_experts >= 1, "tenfold::", kOp, ": num_experts must be at least 1, got ",
                      num_experts);
  check_count(kOp, "num_experts", num_experts);
  const int64_t slots = index.numel();
  check_count(kOp, "slots", slots);
  return {as_contiguous(index),
          slots,
          num_experts,
          allow_sentinel,
          new_output(index, {slots}, ScalarType::Int),
          new_output(index, {slots}, ScalarType::Int),
          new_output(index, {num_experts}, ScalarType::Int),
          new_output(index, {num_experts + 1}, ScalarType::Int)};
}

PermuteCall check_permute(const char* op, const char* arg, const Tensor& x, const Tensor& order,
                          int64_t k, int64_t tokens) {
  check_float_dtype(op, arg, x);
  check_dim(op, arg, x, 2, "of rows of d");
  check_index_dtype(op, "order", order);
  check_dim(op, "order", order, 1, "[S]");
  TENFOLD_CHECK_VALUE(k >= 1, "tenfold::", op, ": k must be at least 1, got ", k);
  TENFOLD_CHECK_VALUE(tokens >= 0, "tenfold::", op, ": tokens must be at least 0, got ", tokens);
  check_count(op, "k", k);
  check_count(op, "slots", tokens * k);
  check_place(op, "order", order, arg, x);
  return {with_contiguous_rows(x),
          check_index_values(op, "order", order, -1, tokens * k),
          order.sizes()[0],
          tokens,
          k,
          x.sizes()[1]};
}

CombineCall check_combine(const char* op, const Tensor& y, const Tensor& weight,
                          const Tensor& inverse) {
  check_float_dtype(op, "y", y);
  check_dim(op, "y", y, 2, "[S, d]");
  check_float32(op, "weight", weight);
  check_dim(op, "weight", weight, 2, "[T, k]");
  check_index_dtype(op, "inverse", inverse);
  check_fits(op, "inverse", inverse, {weight.numel()}, "[T k]", "weight", weight);
  check_place(op, "weight", weight, "y", y);
  check_place(op, "inverse", inverse, "y", y);
  check_count(op, "rows of y", y.sizes()[0]);
  return {with_contiguous_rows(y),
          as_contiguous(weight),
          check_index_values(op, "inverse", inverse, -1, y.sizes()[0]),
          weight.sizes()[0],
          weight.sizes()[1],
          y.sizes()[1]};
}

Tensor check_combine_grad(const char* op, const Tensor& grad, const CombineCall& c, const Tensor& y,
                          const Tensor& weight) {
  check_fits(op, "grad", grad, {c.tokens, c.dim}, "[T, d]", "weight", weight);
  check_place(op, "grad", grad, "y", y);
  TENFOLD_CHECK_TYPE(grad.scalar_type() == y.scalar_type(), "tenfold::", op,
                     ": grad must have the dtype of y (", dtype_name(y.scalar_type()), "), got ",
                     dtype_name(grad.scalar_type()));
  return with_contiguous_rows(grad);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "moe_sort(Tensor index, int num_experts, *, bool allow_sentinel=False) "
      "-> (Tensor order, Tensor inverse, Tensor counts, Tensor offsets)");
  m.def("moe_permute(Tensor x, Tensor order, int k) -> Tensor");
  m.def("moe_permute_backward(Tensor grad, Tensor order, int k, int tokens) -> Tensor");
  m.def("moe_combine(Tensor y, Tensor weight, Tensor inverse) -> Tensor");
  // Gradients that are not wanted are empty.
  m.def(
      "moe_combine_backward(Tensor grad, Tensor y, Tensor weight, Tensor inverse, bool of_y, "
      "bool of_weight) -> (Tensor grad_y, Tensor grad_weight)");
}
