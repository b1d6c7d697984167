// SPDX-License-Identifier: Apache-2.0
// CUDA registration of fusion_mse and fusion_mse_backward.
#include <torch/csrc/stable/library.h>

#include "attention/cuda/fusion_mse_kernel.cuh"
#include "attention/cuda/heads_impl.h"

namespace tenfold::cuda {
namespace {

FusionMseArgs mse_args(const char* op, const Tensor& omega) {
  FusionMseArgs a{};
  a.omega = data_as<float>(omega);
  a.num_groups = omega.sizes()[0], a.size = omega.sizes()[1], a.dims = omega.sizes()[3];
  a.scale = fusion_mse_scale(a.size, a.dims);
  check_blocks(op, a.num_groups * a.size);
  return a;
}

Tensor fusion_mse_op(Tensor omega_in) {
  constexpr auto op = "fusion_mse";
  check_fusion_omega(op, omega_in);
  const Launch launch(omega_in);
  const Tensor omega = torch::stable::contiguous(omega_in);
  FusionMseArgs a = mse_args(op, omega);
  const Tensor out = new_output(omega, {a.num_groups}, ScalarType::Float);
  const Tensor partial = new_output(omega, {a.num_groups * a.size}, ScalarType::Float);
  a.mse = data_as<float>(out), a.partial = data_as<float>(partial);
  launch_fusion_mse(a, launch.stream);
  launch.check();
  return out;
}

Tensor fusion_mse_backward_op(Tensor dout, Tensor omega_in) {
  constexpr auto op = "fusion_mse_backward";
  check_fusion_mse_backward(op, dout, omega_in);
  const Launch launch(omega_in);
  const Tensor omega = torch::stable::contiguous(omega_in);
  FusionMseArgs a = mse_args(op, omega);
  const Tensor out = new_output(omega, {a.num_groups, a.size, a.size, a.dims}, ScalarType::Float);
  a.dout = data_as<float>(dout), a.dout_stride = dout.strides()[0];
  a.domega = data_as<float>(out);
  launch_fusion_mse_backward(a, launch.stream);
  launch.check();
  return out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("fusion_mse", TORCH_BOX(&tenfold::cuda::fusion_mse_op));
  m.impl("fusion_mse_backward", TORCH_BOX(&tenfold::cuda::fusion_mse_backward_op));
}
