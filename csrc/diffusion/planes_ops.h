// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the parts of conv1d_planes share.
#pragma once

#include "diffusion/planes.h"
#include "diffusion/signals.h"

namespace tenfold {

void check_planes(const Tensor& x, const Tensor& c, const Tensor& weight, const OptTensor& bias);

struct PlanesAddCall {
  Tensor y, taps;  // contiguous [B, O, L], [B, O, K]
  OptTensor bias;  // contiguous, dtype of y
  bool edges_only;

  int64_t rows() const { return y.sizes()[0] * y.sizes()[1]; }
  int64_t channels() const { return y.sizes()[1]; }
  int64_t length() const { return y.sizes()[2]; }
  int64_t size() const { return taps.sizes()[2]; }
};
PlanesAddCall check_planes_add(const Tensor& y, const Tensor& taps, const OptTensor& bias,
                               bool edges_only);

struct PlanesSumsCall {
  Tensor grad, sums;  // contiguous [B, O, L], [B, O, K]

  int64_t rows() const { return grad.sizes()[0] * grad.sizes()[1]; }
  int64_t length() const { return grad.sizes()[2]; }
  int64_t size() const { return sums.sizes()[2]; }
};
PlanesSumsCall check_planes_sums(const Tensor& grad, int64_t kernel_size);

template <auto kAdd, auto kSums>
struct PlanesOps {
  static void check(Tensor x, Tensor c, Tensor weight, OptTensor bias) {
    check_planes(x, c, weight, bias);
  }
  static void add(Tensor y, Tensor taps, OptTensor bias, bool edges_only) {
    kAdd(check_planes_add(y, taps, bias, edges_only));
  }
  static Tensor sums(Tensor grad, int64_t kernel_size) {
    const PlanesSumsCall c = check_planes_sums(grad, kernel_size);
    kSums(c);
    return c.sums;
  }
};

}  // namespace tenfold
