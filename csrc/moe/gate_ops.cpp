// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of moe_gate and moe_gate_linear.
#include "moe/gate_ops.h"

#include <torch/csrc/stable/library.h>

#include <utility>

namespace tenfold {

GateCall check_gate(const char* op, const Tensor& logits_in, int64_t k, bool renormalize) {
  check_float_dtype(op, "logits", logits_in);
  check_dim(op, "logits", logits_in, 2, "[T, n]");
  const int64_t tokens = logits_in.sizes()[0], experts = logits_in.sizes()[1];
  check_k(op, k, experts);
  const Tensor logits = with_contiguous_rows(logits_in);
  return {logits,
          tokens,
          experts,
          k,
          renormalize,
          new_output(logits, {tokens, k}, ScalarType::Float),
          new_output(logits, {tokens, k}, ScalarType::Int)};
}

GateGradCall check_gate_grad(const char* op, const Tensor& grad, const Tensor& logits_in,
                             const Tensor& weight, const Tensor& index, bool renormalize,
                             const OptTensor& also) {
  check_float_dtype(op, "logits", logits_in);
  check_dim(op, "logits", logits_in, 2, "[T, n]");
  const int64_t tokens = logits_in.sizes()[0], experts = logits_in.sizes()[1];
  check_dim(op, "weight", weight, 2, "[T, k]");
  const int64_t k = weight.sizes()[1];
  check_k(op, k, experts);
  check_float32(op, "weight", weight);
  check_float32(op, "grad_weight", grad);
  check_fits(op, "weight", weight, {tokens, k}, "[T, k]", "logits", logits_in);
  check_fits(op, "grad_weight", grad, {tokens, k}, "[T, k]", "weight", weight);
  check_fits(op, "index", index, {tokens, k}, "[T, k]", "weight", weight);
  check_place(op, "weight", weight, "logits", logits_in);
  check_place(op, "grad_weight", grad, "logits", logits_in);
  check_place(op, "index", index, "logits", logits_in);
  OptTensor more;
  if (also) {
    check_float32(op, "grad_logits", *also);
    check_fits(op, "grad_logits", *also, {tokens, experts}, "[T, n]", "logits", logits_in);
    check_place(op, "grad_logits", *also, "logits", logits_in);
    more = as_contiguous(*also);
  }
  const Tensor logits = with_contiguous_rows(logits_in);
  return {logits,
          as_contiguous(weight),
          as_contiguous(grad),
          check_index_values(op, "index", index, 0, experts),
          more,
          renormalize,
          new_output(logits, {tokens, experts}, logits.scalar_type())};
}

RouterCall check_router(const char* op, const Tensor& x, const Tensor& w_router) {
  check_float_dtype(op, "x", x);
  check_dim(op, "x", x, 2, "[T, d]");
  check_dim(op, "w_router", w_router, 2, "[n, d]");
  const auto s = w_router.scalar_type();
  TENFOLD_CHECK_TYPE(s == x.scalar_type() || s == ScalarType::Float, "tenfold::", op,
                     ": w_router must be float32 or have the dtype of x (",
                     dtype_name(x.scalar_type()), "), got ", dtype_name(s));
  check_place(op, "w_router", w_router, "x", x);
  const int64_t experts = w_router.sizes()[0], dim = x.sizes()[1];
  TENFOLD_CHECK_VALUE(w_router.sizes()[1] == dim, "tenfold::", op, ": w_router must be [n, ", dim,
                      "] to match x ", shape_str(x), ", got ", shape_str(w_router));
  TENFOLD_CHECK_VALUE(experts > 0 && dim > 0, "tenfold::", op,
                      ": w_router must have at least one row and one column, got ",
                      shape_str(w_router));
  return {with_contiguous_rows(x), with_contiguous_rows(w_router), x.sizes()[0], dim, experts};
}

RouterGradCall check_router_grad(const char* op, const RouterCall& r, const OptTensor& grad_logits,
                                 const OptTensor& grad_weight, const Tensor& logits,
                                 const Tensor& weight, const Tensor& index, bool renormalize) {
  const auto check = [&](const char* arg, const Tensor& t) {
    check_float32(op, arg, t);
    check_fits(op, arg, t, {r.tokens, r.experts}, "[T, n]", "x", r.x);
    check_place(op, arg, t, "x", r.x);
  };
  check("logits", logits);
  if (grad_weight) {
    GateGradCall gate =
        check_gate_grad(op, *grad_weight, logits, weight, index, renormalize, grad_logits);
    const Tensor grad = gate.out;
    return {std::move(gate), grad};
  }
  TENFOLD_CHECK_VALUE(grad_logits.has_value(), "tenfold::", op,
                      ": grad_logits or grad_weight must be given, got neither");
  check("grad_logits", *grad_logits);
  return {std::nullopt, as_contiguous(*grad_logits)};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("moe_gate(Tensor logits, int k, bool renormalize=True) -> (Tensor weight, Tensor index)");
  // moe_gate and moe_sort in one: on the CPU only, where calls are what few tokens cost.
  m.def(
      "moe_route(Tensor logits, int k, bool renormalize=True) -> (Tensor weight, Tensor index, "
      "Tensor order, Tensor inverse, Tensor counts, Tensor offsets)");
  m.def(
      "moe_gate_backward(Tensor grad_weight, Tensor logits, Tensor weight, Tensor index, "
      "bool renormalize=True) -> Tensor");
  m.def(
      "moe_gate_linear(Tensor x, Tensor w_router, int k, bool renormalize=True) "
      "-> (Tensor logits, Tensor weight, Tensor index)");
  // Gradients that are not wanted are empty.
  m.def(
      "moe_gate_linear_backward(Tensor? grad_logits, Tensor? grad_weight, Tensor x, "
      "Tensor w_router, Tensor logits, Tensor weight, Tensor index, bool renormalize, bool of_x, "
      "bool of_w) -> (Tensor grad_x, Tensor grad_w)");
}
