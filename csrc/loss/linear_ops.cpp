// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of linear_cross_entropy, linear_logprob and weighted_linear_ce.
#include "loss/linear_ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace tenfold {
namespace {

LinearLossCall check_layer(const char* op, const Tensor& hidden, const Tensor& weight,
                           const char* name, const Tensor& target, double temperature) {
  check_float_dtype(op, "hidden", hidden);
  check_same_dtype(op, "hidden", hidden, "weight", weight);
  check_int_dtype(op, name, target);
  check_same_device(op, "hidden", hidden, "weight", weight);
  check_same_device(op, "hidden", hidden, name, target);
  check_dim(op, "hidden", hidden, 2, "[N, H]");
  check_dim(op, "weight", weight, 2, "[V, H]");
  const int64_t rows = hidden.sizes()[0], dim = hidden.sizes()[1];
  TENFOLD_CHECK_VALUE(weight.sizes()[1] == dim, "tenfold::", op, ": weight must be [V, ", dim,
                      "] to match hidden ", shape_str(hidden), ", got ", shape_str(weight));
  TENFOLD_CHECK_VALUE(dim > 0, "tenfold::", op, ": hidden must have H > 0, got ",
                      shape_str(hidden));
  TENFOLD_CHECK_VALUE(weight.sizes()[0] > 0, "tenfold::", op,
                      ": weight must have at least one row, got ", shape_str(weight));
  TENFOLD_CHECK_VALUE(target.dim() == 1 && target.sizes()[0] == rows, "tenfold::", op, ": ", name,
                      " must be [", rows, "], one per row of hidden, got ", shape_str(target));
  TENFOLD_CHECK_VALUE(temperature > 0.0 && std::isfinite(temperature), "tenfold::", op,
                      ": temperature must be finite and above 0, got ", temperature);
  LinearLossCall c{with_contiguous_rows(hidden),
                   with_contiguous_rows(weight),
                   target.is_contiguous() ? target : torch::stable::contiguous(target),
                   std::nullopt,
                   rows,
                   dim,
                   weight.sizes()[0],
                   0,
                   0,
                   -100,
                   LossReduction::none,
                   0.0f,
                   0.0f,
                   static_cast<float>(temperature)};
  c.hidden_stride = c.hidden.strides()[0];
  c.weight_stride = c.weight.strides()[0];
  return c;
}

LossReduction parse_reduction(const char* op, const std::string& name) {
  if (name == "mean") return LossReduction::mean;
  if (name == "sum") return LossReduction::sum;
  TENFOLD_CHECK_VALUE(name == "none", "tenfold::", op,
                      ": reduction must be mean, sum or none, got ", name);
  return LossReduction::none;
}

}  // namespace

OptTensor check_row_floats(const char* op, const char* arg, const OptTensor& t, const Tensor& of,
                           bool scalar, const char* of_name) {
  if (!t) return t;
  const int64_t rows = of.sizes()[0];
  check_same_device(op, of_name, of, arg, *t);
  TENFOLD_CHECK_TYPE(t->scalar_type() == ScalarType::Float, "tenfold::", op, ": ", arg,
                     " must be float32, got ", dtype_name(t->scalar_type()));
  const bool fits = scalar ? t->dim() == 0 : t->dim() == 1 && t->sizes()[0] == rows;
  TENFOLD_CHECK_VALUE(fits || scalar, "tenfold::", op, ": ", arg, " must be [", rows, "], got ",
                      shape_str(*t));
  TENFOLD_CHECK_VALUE(fits, "tenfold::", op, ": ", arg, " must be 0-d, got ", shape_str(*t));
  return t->is_contiguous() ? t : torch::stable::contiguous(*t);
}

LinearLossCall check_linear_loss(const char* op, const Tensor& hidden, const Tensor& weight,
                                 const Tensor& target, const OptTensor& row_weight,
                                 int64_t ignore_index, const std::string& reduction, double softcap,
                                 double z_loss, double temperature) {
  LinearLossCall c = check_layer(op, hidden, weight, "target", target, temperature);
  c.row_weight = check_row_floats(op, "row_weight", row_weight, hidden);
  c.reduction = parse_reduction(op, reduction);
  TENFOLD_CHECK_VALUE(softcap >= 0.0 && std::isfinite(softcap), "tenfold::", op,
                      ": softcap must be finite, and 0 (none) or above, got ", softcap);
  TENFOLD_CHECK_VALUE(z_loss >= 0.0 && std::isfinite(z_loss), "tenfold::", op,
                      ": z_loss must be finite, and 0 or above, got ", z_loss);
  c.ignore_index = ignore_index;
  c.softcap = static_cast<float>(softcap);
  c.z_loss = static_cast<float>(z_loss);
  return c;
}

LinearLossCall check_linear_logprob(const char* op, const Tensor& hidden, const Tensor& weight,
                                    const Tensor& ids, double temperature) {
  return check_layer(op, hidden, weight, "ids", ids, temperature);
}

LinearLossCall check_weighted_loss(const char* op, const Tensor& hidden, const Tensor& weight,
                                   const Tensor& targets, const Tensor& w, int64_t chunk,
                                   int64_t ignore_index) {
  LinearLossCall c = check_layer(op, hidden, weight, "targets", targets, 1.0);
  c.row_weight = check_row_floats(op, "w", w, hidden);
  TENFOLD_CHECK_VALUE(chunk >= 0, "tenfold::", op,
                      ": chunk must be 0 (the kernel's choice) or a number of rows, got ", chunk);
  c.ignore_index = ignore_index;
  c.reduction = LossReduction::sum;
  c.chunk = chunk;
  return c;
}

void check_grad_of(const char* op, const std::string& name) {
  TENFOLD_CHECK_VALUE(name == "loss_sum" || name == "nll", "tenfold::", op,
                      ": grad_of must be loss_sum or nll, got '", name, "'");
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, *, "
      "Tensor? row_weight=None, int ignore_index=-100, str reduction='mean', float softcap=0.0, "
      "float z_loss=0.0, float temperature=1.0) -> (Tensor loss, Tensor lse)");
  // Loss and its gradients at once (those that are not wanted are empty): a mean or a sum has one
  // number of upstream gradient, by which they are multiplied afterwards.
  m.def(
      "linear_cross_entropy_grads(Tensor hidden, Tensor weight, Tensor target, bool of_hidden, "
      "bool of_weight, *, Tensor? row_weight=None, int ignore_index=-100, str reduction='mean', "
      "float softcap=0.0, float z_loss=0.0, float temperature=1.0) "
      "-> (Tensor loss, Tensor lse, Tensor grad_hidden, Tensor grad_weight)");
  m.def(
      "linear_cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor hidden, "
      "Tensor weight, Tensor target, Tensor lse, bool of_hidden, bool of_weight, *, "
      "Tensor? row_weight=None, int ignore_index=-100, str reduction='mean', float softcap=0.0, "
      "float z_loss=0.0, float temperature=1.0) -> (Tensor grad_hidden, Tensor grad_weight)");
  m.def(
      "linear_logprob(Tensor hidden, Tensor weight, Tensor ids, float temperature=1.0) "
      "-> (Tensor logp, Tensor lse, Tensor entropy)");
  m.def(
      "linear_logprob_backward(Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, "
      "Tensor hidden, Tensor weight, Tensor ids, Tensor lse, Tensor entropy, bool of_hidden, "
      "bool of_weight, float temperature) -> (Tensor grad_hidden, Tensor grad_weight)");
  // grad_of, loss_sum or nll: which result will be differentiated; read by autograd only.
  m.def(
      "weighted_linear_ce(Tensor hidden, Tensor weight, Tensor targets, Tensor w, int chunk=0, *, "
      "int ignore_index=-100, str grad_of='loss_sum') "
      "-> (Tensor loss_sum, Tensor w_sum, Tensor nll)");
  // With lse [N], which its backward needs.
  m.def(
      "weighted_linear_ce_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor w, "
      "int chunk=0, *, int ignore_index=-100) "
      "-> (Tensor loss_sum, Tensor w_sum, Tensor nll, Tensor lse)");
  // And with the gradients of loss_sum; those that are not wanted are empty.
  m.def(
      "weighted_linear_ce_grads(Tensor hidden, Tensor weight, Tensor targets, Tensor w, "
      "bool of_hidden, bool of_weight, int chunk=0, *, int ignore_index=-100) "
      "-> (Tensor loss_sum, Tensor w_sum, Tensor nll, Tensor lse, Tensor grad_hidden, "
      "Tensor grad_weight)");
  m.def(
      "weighted_linear_ce_backward(Tensor? grad_sum, Tensor? grad_nll, Tensor hidden, "
      "Tensor weight, Tensor targets, Tensor w, Tensor lse, bool of_hidden, bool of_weight, "
      "int chunk=0, *, int ignore_index=-100) -> (Tensor grad_hidden, Tensor grad_weight)");
}
