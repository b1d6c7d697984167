// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of gn1_gelu share.
#pragma once

#include <optional>
#include <tuple>

#include "core/check.h"
#include "core/tensor.h"
#include "norm/gn1_gelu.h"

namespace tenfold {

struct Gn1Call {
  Tensor x;                        // contiguous
  Tensor weight, bias;             // contiguous
  std::optional<Tensor> residual;  // contiguous
  double eps;
  Tensor y;
  ScalarType real;  // of mean and rstd
  bool fresh, in_place;

  int64_t samples() const { return x.sizes()[0]; }
  int64_t channels() const { return x.sizes()[1]; }
  int64_t length() const { return x.sizes()[2]; }
};
// y null: fresh.
Gn1Call check_gn1_gelu(const char* op, const Tensor* y, const Tensor& x, const Tensor& weight,
                       const Tensor& bias, const std::optional<Tensor>& residual, double eps);

struct Gn1GradCall {
  Tensor dy, x, weight, bias, mean, rstd;  // contiguous
  Tensor dx, dweight, dbias;

  int64_t samples() const { return x.sizes()[0]; }
  int64_t channels() const { return x.sizes()[1]; }
  int64_t length() const { return x.sizes()[2]; }
};
Gn1GradCall check_gn1_gelu_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                    const Tensor& bias, const Tensor& mean, const Tensor& rstd);

// The ops, with what a backend runs: kForward(call, mean, rstd), either of which may be null.
template <auto kForward, auto kBackward>
struct Gn1Ops {
  using Three = std::tuple<Tensor, Tensor, Tensor>;

  static Three forward(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual,
                       double eps) {
    const Gn1Call c = check_gn1_gelu("gn1_gelu", nullptr, x, weight, bias, residual, eps);
    const Tensor mean = new_output(x, {c.samples()}, c.real);
    const Tensor rstd = new_output(x, {c.samples()}, c.real);
    kForward(c, &mean, &rstd);
    return {c.y, mean, rstd};
  }
  static void forward_out(Tensor y, Tensor x, Tensor weight, Tensor bias,
                          std::optional<Tensor> residual, double eps) {
    kForward(check_gn1_gelu("gn1_gelu_", &y, x, weight, bias, residual, eps), nullptr, nullptr);
  }
  static Three backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) {
    const Gn1GradCall c = check_gn1_gelu_backward(dy, x, weight, bias, mean, rstd);
    kBackward(c);
    return {c.dx, c.dweight, c.dbias};
  }
};

}  // namespace tenfold
