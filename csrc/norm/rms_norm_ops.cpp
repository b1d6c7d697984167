// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of rms_norm.
#include "norm/rms_norm_ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "core/contiguous.h"
#include "core/dispatch.h"

namespace tenfold {
namespace {

bool narrow(ScalarType t) {
  return t != ScalarType::Float;
}

void check_weight(const char* op, const Tensor& x, const Tensor& weight) {
  check_float_dtype(op, "weight", weight);
  const auto own = weight.scalar_type(), of_x = x.scalar_type();
  TENFOLD_CHECK_VALUE(own == of_x || !narrow(own) || !narrow(of_x), "tenfold::", op,
                      ": weight must be float32 or have the dtype of x (", dtype_name(of_x),
                      "), got ", dtype_name(own));
  const int64_t cols = x.sizes()[x.dim() - 1];
  check_sizes(op, "weight", weight, {cols}, "[the last size of x]");
  if (!x.is_cpu() || !weight.is_cpu()) check_same_device(op, "x", x, "weight", weight);
}

// The dtype of y, and whether what the weight multiplies is rounded to it first.
struct Order {
  ScalarType y;
  bool rounds;
};
Order order_of(RmsOrder order, ScalarType x, ScalarType weight) {
  switch (order) {
    case RmsOrder::llama: return {x, narrow(x)};
    case RmsOrder::as_t5: return {narrow(weight) ? weight : x, narrow(weight)};
    default: return {x, false};
  }
}

// A given tensor for a result.
Rows check_result(const char* op, const char* arg, const Tensor& t, const Tensor& x,
                  ScalarType dtype, RowShape shape) {
  TENFOLD_CHECK_VALUE(t.scalar_type() == dtype, "tenfold::", op, ": ", arg, " must be ",
                      dtype_name(dtype), ", got ", dtype_name(t.scalar_type()));
  check_like(op, "x", x, arg, t);
  return writable_rows(op, arg, t, shape);
}

// Whether a result is exactly over an input.
bool over(const Rows& result, const Rows& input) {
  return result.data == input.data;
}

}  // namespace

RmsOrder rms_order_of(const char* op, const std::string& order) {
  if (order == "llama") return RmsOrder::llama;
  if (order == "t5") return RmsOrder::as_t5;
  TENFOLD_CHECK_VALUE(order == "float", "tenfold::", op,
                      ": order must be llama, t5 or float, got '", order, "'");
  return RmsOrder::as_float;
}

RmsOrder rms_order_of(const char* op, int64_t order) {
  TENFOLD_CHECK_VALUE(order >= 0 && order <= 2, "tenfold::", op,
                      ": order must be 0 (llama), 1 (t5) or 2 (float), got ", order);
  return static_cast<RmsOrder>(order);
}

RmsCall check_rms_norm(const char* op, const Tensor* y, const OptTensor& sum, const Tensor& x,
                       const OptTensor& residual, const Tensor& weight, double eps,
                       RmsOrder order) {
  check_float_dtype(op, "x", x);
  check_has_rows(op, "x", x);
  check_weight(op, x, weight);
  if (residual) {
    check_same_dtype(op, "x", x, "residual", *residual);
    check_like(op, "x", x, "residual", *residual);
  }
  TENFOLD_CHECK_VALUE(eps >= 0.0 && std::isfinite(eps), "tenfold::", op,
                      ": eps must be finite, and 0 or above, got ", eps);
  const ScalarType dtype = x.scalar_type(), of_weight = weight.scalar_type();
  const Order way = order_of(order, dtype, of_weight);
  TENFOLD_CHECK_VALUE(y == nullptr || sum.has_value() == residual.has_value(), "tenfold::", op,
                      ": sum must be given where residual is, and only there");
  const RowShape shape = row_shape(x);
  RmsCall c{shape,
            readable_rows(x, shape),
            y == nullptr ? new_rows(x, way.y, shape) : check_result(op, "y", *y, x, way.y, shape),
            {},
            {},
            as_contiguous(weight),
            false,
            y == nullptr,
            {}};
  if (residual) c.residual = readable_rows(*residual, shape);
  if (y == nullptr) {
    if (residual) c.sum = new_rows(x, dtype, shape);
  } else {
    check_apart(op, "y", c.y, "x", c.x, c.shape);
    c.in_place = over(c.y, c.x);
    if (residual) {
      c.sum = check_result(op, "sum", *sum, x, dtype, shape);
      check_apart(op, "y", c.y, "residual", *c.residual, c.shape);
      check_apart(op, "sum", *c.sum, "x", c.x, c.shape);
      check_apart(op, "sum", *c.sum, "residual", *c.residual, c.shape);
      check_apart(op, "y", c.y, "sum", *c.sum, c.shape, false);
      c.in_place =
          c.in_place || over(c.y, *c.residual) || over(*c.sum, c.x) || over(*c.sum, *c.residual);
    }
  }
  RmsRows& r = c.rows;
  r.x_dtype = to_dtype(dtype), r.weight_dtype = to_dtype(of_weight);
  r.y_dtype = to_dtype(way.y), r.rounds = way.rounds;
  r.cols = c.shape.cols, r.eps = static_cast<float>(eps);
  r.x = c.x.data, r.x_stride = c.x.stride, r.weight = c.weight.data_ptr();
  r.y = c.y.data, r.y_stride = c.y.stride;
  if (residual) {
    r.residual = c.residual->data, r.residual_stride = c.residual->stride;
    r.sum = c.sum->data, r.sum_stride = c.sum->stride;
  }
  return c;
}

RmsGradCall check_rms_norm_backward(const Tensor& grad_y, const OptTensor& grad_sum,
                                    const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                    bool of_x, bool of_weight) {
  constexpr auto kOp = "rms_norm_backward";
  check_float_dtype(kOp, "x", x);
  check_has_rows(kOp, "x", x);
  check_weight(kOp, x, weight);
  const auto y = grad_y.scalar_type();
  TENFOLD_CHECK_VALUE(
      y == x.scalar_type() || (y == weight.scalar_type() && x.scalar_type() == ScalarType::Float),
      "tenfold::", kOp, ": grad_y must have the dtype of y, got ", dtype_name(y));
  check_like(kOp, "x", x, "grad_y", grad_y);
  if (grad_sum) {
    check_same_dtype(kOp, "x", x, "grad_sum", *grad_sum);
    check_like(kOp, "x", x, "grad_sum", *grad_sum);
  }
  const RowShape shape = row_shape(x);
  TENFOLD_CHECK_VALUE(rstd.scalar_type() == ScalarType::Float && rstd.numel() == shape.rows,
                      "tenfold::", kOp, ": rstd must be float32 with one number per row of x (",
                      shape.rows, "), got ", dtype_name(rstd.scalar_type()), " ", shape_str(rstd));
  if (!x.is_cpu() || !rstd.is_cpu()) check_same_device(kOp, "x", x, "rstd", rstd);
  RmsGradCall c{
      shape,
      readable_rows(grad_y, shape),
      readable_rows(x, shape),
      {},
      as_contiguous(weight),
      as_contiguous(rstd),
      of_x ? new_output(x, x.sizes(), x.scalar_type()) : new_output(x, {0}, x.scalar_type()),
      new_output(weight, {of_weight ? shape.cols : 0}, weight.scalar_type()),
      {}};
  RmsGradRows& r = c.rows;
  r.x_dtype = to_dtype(x.scalar_type()), r.weight_dtype = to_dtype(weight.scalar_type());
  r.y_dtype = to_dtype(y), r.cols = shape.cols;
  r.dy = c.grad_y.data, r.dy_stride = c.grad_y.stride;
  r.h = c.x.data, r.h_stride = c.x.stride;
  r.weight = c.weight.data_ptr(), r.rstd = data_as<float>(c.rstd);
  if (of_x) {
    r.dx = c.dx.data_ptr();
    if (grad_sum) {
      c.grad_sum = readable_rows(*grad_sum, shape);
      r.dsum = c.grad_sum->data, r.dsum_stride = c.grad_sum->stride;
    }
  }
  return c;
}

}  // namespace tenfold

// rms_norm: sum is empty where there is no residual: a result must not be an input, and a copy of x
// would be half of the traffic. rms_norm_ writes into y and sum, which may be x or residual.
// rms_norm_forward(_) is what the faces call where no gradient is wanted: without an Autograd
// kernel the dispatcher does not enter Python, and a string would take half a microsecond.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "rms_norm_forward_(Tensor(a!) y, Tensor(b!)? sum, Tensor x, Tensor? residual, "
      "Tensor weight, float eps, int order) -> ()");
  m.def(
      "rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps, int order) "
      "-> (Tensor y, Tensor sum, Tensor rstd)");
  m.def(
      "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, *, str order=\"llama\") "
      "-> (Tensor y, Tensor sum, Tensor rstd)");
  m.def(
      "rms_norm_(Tensor(a!) y, Tensor(b!)? sum, Tensor x, Tensor? residual, Tensor weight, "
      "float eps, *, str order=\"llama\") -> ()");
  m.def(
      "rms_norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor rstd, "
      "bool of_x, bool of_weight) -> (Tensor grad_x, Tensor grad_weight)");
}
