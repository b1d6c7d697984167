// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of conv1d_planes and its parts. Its kernel is Python: torch's convolution, and
// planes_add_ (python/tenfold/ops/diffusion/planes.py).
#include "diffusion/planes_ops.h"

#include <torch/csrc/stable/library.h>

#include "core/contiguous.h"

namespace tenfold {
namespace {

ScalarType real_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace

void check_planes(const Tensor& x, const Tensor& c, const Tensor& weight, const OptTensor& bias) {
  constexpr auto kOp = "conv1d_planes";
  check_signal(kOp, "x", x);
  TENFOLD_CHECK_VALUE(x.sizes()[1] > 0 && x.sizes()[2] > 0, "tenfold::", kOp,
                      ": x must have a channel and a position at least, got ", shape_str(x));
  const auto beside = [&](const char* arg, const Tensor& t) {
    check_same_dtype(kOp, "x", x, arg, t);
    check_same_device(kOp, "x", x, arg, t);
  };
  beside("c", c);
  beside("weight", weight);
  check_dim(kOp, "c", c, 2, "[B, D]");
  check_sizes(kOp, "c", c, {x.sizes()[0], c.sizes()[1]}, "[B, D]");
  check_dim(kOp, "weight", weight, 3, "[O, C + D, K]");
  const int64_t size = weight.sizes()[2], inputs = x.sizes()[1] + c.sizes()[1];
  TENFOLD_CHECK_VALUE(weight.sizes()[1] == inputs, "tenfold::", kOp, ": weight must be [O, ",
                      x.sizes()[1], " + ", c.sizes()[1], ", K] to match x and c, got ",
                      shape_str(weight));
  TENFOLD_CHECK_VALUE(size % 2 == 1, "tenfold::", kOp,
                      ": weight must have an odd number of taps, got ", size);
  if (!bias) return;
  beside("bias", *bias);
  check_sizes(kOp, "bias", *bias, {weight.sizes()[0]}, "[O]");
}

PlanesAddCall check_planes_add(const Tensor& y, const Tensor& taps, const OptTensor& bias,
                               bool edges_only) {
  constexpr auto kOp = "planes_add_";
  check_signal(kOp, "y", y);
  TENFOLD_CHECK_VALUE(y.is_contiguous(), "tenfold::", kOp,
                      ": y is written in place and must be contiguous");
  TENFOLD_CHECK_TYPE(taps.scalar_type() == real_of(y), "tenfold::", kOp, ": taps must be ",
                     dtype_name(real_of(y)), ", got ", dtype_name(taps.scalar_type()));
  check_dim(kOp, "taps", taps, 3, "[B, O, K]");
  const int64_t size = taps.sizes()[2];
  check_sizes(kOp, "taps", taps, {y.sizes()[0], y.sizes()[1], size}, "[B, O, K]");
  TENFOLD_CHECK_VALUE(size % 2 == 1, "tenfold::", kOp,
                      ": taps must be an odd number for each row, got ", size);
  check_same_device(kOp, "y", y, "taps", taps);
  PlanesAddCall c{y, as_contiguous(taps), std::nullopt, edges_only};
  if (!bias) return c;
  check_same_dtype(kOp, "y", y, "bias", *bias);
  check_sizes(kOp, "bias", *bias, {y.sizes()[1]}, "[O]");
  check_same_device(kOp, "y", y, "bias", *bias);
  c.bias = as_contiguous(*bias);
  return c;
}

PlanesSumsCall check_planes_sums(const Tensor& grad, int64_t kernel_size) {
  constexpr auto kOp = "planes_sums";
  check_signal(kOp, "grad", grad);
  TENFOLD_CHECK_VALUE(kernel_size > 0 && kernel_size % 2 == 1, "tenfold::", kOp,
                      ": kernel_size must be odd, got ", kernel_size);
  return {as_contiguous(grad),
          new_output(grad, {grad.sizes()[0], grad.sizes()[1], kernel_size}, real_of(grad))};
}

}  // namespace tenfold

// planes_add_: edges_only says that what every position but those at the ends takes, and the bias,
// are in y already; the ends lack the taps that fall outside. planes_check raises what
// conv1d_planes does.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("conv1d_planes(Tensor x, Tensor c, Tensor weight, Tensor? bias) -> Tensor");
  m.def("planes_check(Tensor x, Tensor c, Tensor weight, Tensor? bias) -> ()");
  m.def("planes_add_(Tensor(a!) y, Tensor taps, Tensor? bias, bool edges_only) -> ()");
  m.def("planes_sums(Tensor grad, int kernel_size) -> Tensor");
}
