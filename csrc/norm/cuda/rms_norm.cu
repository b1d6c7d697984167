// SPDX-License-Identifier: Apache-2.0
// CUDA registration of rms_norm.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "norm/cuda/rms_norm_kernel.cuh"
#include "norm/rms_norm_ops.h"

namespace tenfold::cuda {
namespace {

void run_forward(const char* op, const RmsCall& c, float* rstd, const Launch& launch) {
  check_grid(op, rms_blocks(c.shape.rows, c.shape.cols));
  RmsArgs a{c.rows, c.shape.rows};
  a.r.rstd = rstd;
  launch_rms_norm(a, launch.stream);
  launch.check();
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& x,
                                           const OptTensor& residual, const Tensor& weight,
                                           double eps, RmsOrder order) {
  const Launch launch(x);
  const RmsCall c = check_rms_norm(op, nullptr, std::nullopt, x, residual, weight, eps, order);
  const auto sizes = x.sizes();
  const Tensor rstd = new_output(x, sizes.slice(0, sizes.size() - 1), ScalarType::Float);
  const Tensor sum = c.sum ? c.sum->t : new_output(x, {0}, x.scalar_type());
  run_forward(op, c, data_as<float>(rstd), launch);
  return {c.y.t, sum, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_op(Tensor x, OptTensor residual, Tensor weight,
                                               double eps, std::string order) {
  constexpr auto kOp = "rms_norm";
  return forward(kOp, x, residual, weight, eps, rms_order_of(kOp, order));
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward_op(Tensor x, OptTensor residual, Tensor weight,
                                                       double eps, int64_t order) {
  constexpr auto kOp = "rms_norm_forward";
  return forward(kOp, x, residual, weight, eps, rms_order_of(kOp, order));
}

void rms_norm_out_op(Tensor y, OptTensor sum, Tensor x, OptTensor residual, Tensor weight,
                     double eps, std::string order) {
  constexpr auto kOp = "rms_norm_";
  const Launch launch(x);
  const RmsOrder way = rms_order_of(kOp, order);
  run_forward(kOp, check_rms_norm(kOp, &y, sum, x, residual, weight, eps, way), nullptr, launch);
}

void rms_norm_forward_out_op(Tensor y, OptTensor sum, Tensor x, OptTensor residual, Tensor weight,
                             double eps, int64_t order) {
  constexpr auto kOp = "rms_norm_forward_";
  const Launch launch(x);
  const RmsOrder way = rms_order_of(kOp, order);
  run_forward(kOp, check_rms_norm(kOp, &y, sum, x, residual, weight, eps, way), nullptr, launch);
}

std::tuple<Tensor, Tensor> rms_norm_backward_op(Tensor grad_y, OptTensor grad_sum, Tensor x,
                                                Tensor weight, Tensor rstd, bool of_x,
                                                bool of_weight) {
  const Launch launch(x);
  RmsGradCall c = check_rms_norm_backward(grad_y, grad_sum, x, weight, rstd, of_x, of_weight);
  if (!of_x && !of_weight) return {c.dx, c.dw};
  const int64_t strips = rms_strips(c.shape.rows, c.shape.cols, of_weight);
  check_grid("rms_norm_backward", strips);
  DeviceMemory memory(x);
  RmsGradArgs a{c.rows, c.shape.rows, 0, nullptr};
  if (of_weight)  // where there are no rows, the sums of none are 0
    a.parts = static_cast<float*>(memory.room()(4 * strips * c.shape.cols + 4));
  launch_rms_norm_grad(a, c.dw.data_ptr(), launch.stream);
  launch.check();
  return {c.dx, c.dw};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&tenfold::cuda::rms_norm_forward_op));
  m.impl("rms_norm_forward_", TORCH_BOX(&tenfold::cuda::rms_norm_forward_out_op));
  m.impl("rms_norm", TORCH_BOX(&tenfold::cuda::rms_norm_op));
  m.impl("rms_norm_", TORCH_BOX(&tenfold::cuda::rms_norm_out_op));
  m.impl("rms_norm_backward", TORCH_BOX(&tenfold::cuda::rms_norm_backward_op));
}
