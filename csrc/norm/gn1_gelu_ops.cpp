// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of gn1_gelu.
#include "norm/gn1_gelu_ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "core/contiguous.h"
#include "norm/rows.h"

namespace tenfold {
namespace {

// float32, bfloat16, float16; float64 on a CPU. [B, C, L].
void check_x(const char* op, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Double) {
    TENFOLD_CHECK_TYPE(x.is_cpu(), "tenfold::", op, ": x may be float64 on a CPU only, got it on ",
                       device_str(x));
  } else {
    check_float_dtype(op, "x", x);
  }
  check_dim(op, "x", x, 3, "[B, C, L]");
}

void check_parameters(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const ScalarType s = weight.scalar_type();
  TENFOLD_CHECK_VALUE(
      s == x.scalar_type() || (s == ScalarType::Float && x.scalar_type() != ScalarType::Double),
      "tenfold::", op, ": weight must have the dtype of x (", dtype_name(x.scalar_type()),
      ") or be float32, got ", dtype_name(s));
  check_sizes(op, "weight", weight, {x.sizes()[1]}, "[C]");
  check_same_device(op, "x", x, "weight", weight);
  check_same_dtype(op, "weight", weight, "bias", bias);
  check_sizes(op, "bias", bias, {x.sizes()[1]}, "[C]");
  check_same_device(op, "x", x, "bias", bias);
}

ScalarType real_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Rows whole(const Tensor& t) {
  return {t, t.data_ptr(), t.numel()};
}

}  // namespace

Gn1Call check_gn1_gelu(const char* op, const Tensor* y, const Tensor& x, const Tensor& weight,
                       const Tensor& bias, const std::optional<Tensor>& residual, double eps) {
  check_x(op, x);
  check_parameters(op, x, weight, bias);
  if (residual) {
    check_same_dtype(op, "x", x, "residual", *residual);
    check_like(op, "x", x, "residual", *residual);
  }
  TENFOLD_CHECK_VALUE(eps >= 0.0 && std::isfinite(eps), "tenfold::", op,
                      ": eps must be finite, and 0 or above, got ", eps);
  if (y != nullptr) {
    check_same_dtype(op, "x", x, "y", *y);
    check_like(op, "x", x, "y", *y);
    TENFOLD_CHECK_VALUE(y->is_contiguous(), "tenfold::", op,
                        ": y is written in place and must be contiguous");
  }
  Gn1Call c{as_contiguous(x),
            as_contiguous(weight),
            as_contiguous(bias),
            std::nullopt,
            eps,
            y == nullptr ? new_output(x, x.sizes(), x.scalar_type()) : *y,
            real_of(x),
            y == nullptr,
            false};
  if (residual) c.residual = as_contiguous(*residual);
  if (y == nullptr || x.numel() == 0) return c;
  const RowShape shape{1, x.numel()};
  check_apart(op, "y", whole(c.y), "x", whole(c.x), shape);
  if (c.residual) check_apart(op, "y", whole(c.y), "residual", whole(*c.residual), shape);
  const void* const data = c.y.data_ptr();
  c.in_place = data == c.x.data_ptr() || (c.residual && data == c.residual->data_ptr());
  return c;
}

Gn1GradCall check_gn1_gelu_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                    const Tensor& bias, const Tensor& mean, const Tensor& rstd) {
  constexpr auto kOp = "gn1_gelu_backward";
  check_x(kOp, x);
  check_same_dtype(kOp, "x", x, "dy", dy);
  check_like(kOp, "x", x, "dy", dy);
  check_parameters(kOp, x, weight, bias);
  const Tensor* const given[] = {&mean, &rstd};
  const char* const names[] = {"mean", "rstd"};
  for (int i = 0; i < 2; ++i) {
    TENFOLD_CHECK_TYPE(given[i]->scalar_type() == real_of(x), "tenfold::", kOp, ": ", names[i],
                       " must be ", dtype_name(real_of(x)), ", got ",
                       dtype_name(given[i]->scalar_type()));
    check_sizes(kOp, names[i], *given[i], {x.sizes()[0]}, "[B]");
    check_same_device(kOp, "x", x, names[i], *given[i]);
  }
  return {as_contiguous(dy),
          as_contiguous(x),
          as_contiguous(weight),
          as_contiguous(bias),
          as_contiguous(mean),
          as_contiguous(rstd),
          new_output(x, x.sizes(), x.scalar_type()),
          new_output(weight, weight.sizes(), weight.scalar_type()),
          new_output(bias, bias.sizes(), bias.scalar_type())};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "gn1_gelu(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "gn1_gelu_(Tensor(a!) y, Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps) "
      "-> ()");
  m.def(
      "gn1_gelu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}
