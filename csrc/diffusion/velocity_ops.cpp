// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of vdiff_noise, vdiff_noise_rng and vdiff_loss.
#include "diffusion/velocity_ops.h"

#include <torch/csrc/stable/library.h>

#include "core/contiguous.h"

namespace tenfold {

NoiseCall check_noise(const char* op, const NoiseResults* out, const Tensor& x0, const Tensor& t,
                      const OptTensor& noise, NoiseStream stream) {
  check_signal(op, "x0", x0);
  check_numbers(op, "x0", x0, "t", t);
  if (noise) check_beside(op, "x0", x0, "noise", *noise);
  check_times(op, "t", t);
  if (out == nullptr) {
    const auto made = [&] { return new_output(x0, x0.sizes(), x0.scalar_type()); };
    NoiseCall c{as_contiguous(x0), std::nullopt, t, made(), made(), stream, true, false};
    if (noise) c.noise = as_contiguous(*noise);
    return c;
  }
  TENFOLD_CHECK_VALUE(out->z || out->v, "tenfold::", op, ": z and v are both None");
  if (out->z) check_result(op, "z", *out->z, "x0", x0);
  if (out->v) check_result(op, "v", *out->v, "x0", x0);
  NoiseCall c{as_contiguous(x0), std::nullopt, t, out->z, out->v, stream, false, false};
  if (noise) c.noise = as_contiguous(*noise);
  const auto apart = [&](const char* name, const OptTensor& result) {
    if (!result || result->numel() == 0) return;
    check_same_or_apart(op, name, *result, "x0", c.x0);
    if (c.noise) check_same_or_apart(op, name, *result, "noise", *c.noise);
    const void* const data = result->data_ptr();
    c.in_place |= data == c.x0.data_ptr() || (c.noise && data == c.noise->data_ptr());
  };
  apart("z", c.z);
  apart("v", c.v);
  if (c.z && c.v && c.z->numel() > 0) {
    check_same_or_apart(op, "z", *c.z, "v", *c.v);
    TENFOLD_CHECK_VALUE(c.z->data_ptr() != c.v->data_ptr(), "tenfold::", op,
                        ": z and v must not be the same tensor");
  }
  return c;
}

LossCall check_loss(const char* op, const OptTensor& grad, const Tensor& v_hat, const Tensor& x0,
                    const Tensor& noise, const Tensor& t) {
  check_signal(op, "x0", x0);
  check_velocity(op, "x0", x0, "v_hat", v_hat);
  check_beside(op, "x0", x0, "noise", noise);
  check_numbers(op, "x0", x0, "t", t);
  const ScalarType real =
      x0.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t samples = x0.sizes()[0];
  if (grad) {
    TENFOLD_CHECK_TYPE(grad->scalar_type() == real, "tenfold::", op, ": grad must be ",
                       dtype_name(real), ", got ", dtype_name(grad->scalar_type()));
    check_sizes(op, "grad", *grad, {samples}, "[B]");
    check_same_device(op, "x0", x0, "grad", *grad);
  }
  check_times(op, "t", t);
  return {as_contiguous(v_hat),
          as_contiguous(x0),
          as_contiguous(noise),
          t,
          grad,
          grad ? new_output(v_hat, v_hat.sizes(), v_hat.scalar_type())
               : new_output(x0, {samples}, real)};
}

}  // namespace tenfold

// The forms that end in _ write into z and v; what is None is not made.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("vdiff_noise(Tensor x0, Tensor t, Tensor noise) -> (Tensor z, Tensor v)");
  m.def(
      "vdiff_noise_(Tensor(a!)? z, Tensor(b!)? v, Tensor x0, Tensor t, Tensor noise) "
      "-> ()");
  m.def("vdiff_noise_rng(Tensor x0, Tensor t, int seed, int offset) -> (Tensor z, Tensor v)");
  m.def(
      "vdiff_noise_rng_(Tensor(a!)? z, Tensor(b!)? v, Tensor x0, Tensor t, int seed, int offset) "
      "-> ()");
  m.def("vdiff_loss(Tensor v_hat, Tensor x0, Tensor noise, Tensor t) -> Tensor");
  m.def(
      "vdiff_loss_backward(Tensor grad, Tensor v_hat, Tensor x0, Tensor noise, Tensor t) "
      "-> Tensor");
}
