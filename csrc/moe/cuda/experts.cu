// SPDX-License-Identifier: Apache-2.0
// CUDA registration of grouped_gemm, grouped_gemm_wgrad and moe_swiglu_mlp with its gradients.
// Values of offsets, gather and index are not read by the host: offsets are cut to the rows there
// are, a gathered row that does not exist is zeros, and a slot whose index names no expert adds
// nothing.
#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "core/stream.h"
#include "moe/cuda/device_block.h"

namespace tenfold::cuda {
namespace {

Tensor grouped_gemm_op(Tensor a, Tensor w, Tensor offsets, bool trans_w, OptTensor gather) {
  constexpr auto kOp = "grouped_gemm";
  const GroupedCall c = check_grouped_gemm(a, w, offsets, trans_w, gather);
  const Tensor out = new_output(c.a, {c.slots, c.cols}, c.a.scalar_type());
  if (out.numel() == 0) return out;
  const Launch launch(c.a);
  const GroupedGemmCall call{device_rows(c.a),
                             device_matrices(c.w),
                             trans_w,
                             int_array(c.offsets),
                             int_array(c.gather),
                             c.slots,
                             c.a_rows,
                             c.groups,
                             c.cols,
                             c.depth,
                             out.data_ptr()};
  dispatch_dtype(c.a.scalar_type(), kOp,
                 [&]<class T>() { grouped_gemm<T>(call, {}, launch.stream); });
  launch.check();
  return out;
}

Tensor grouped_gemm_wgrad_op(Tensor dy, Tensor a, Tensor offsets, OptTensor gather) {
  constexpr auto kOp = "grouped_gemm_wgrad";
  const GroupedCall c = check_grouped_gemm_wgrad(dy, a, offsets, gather);
  const Tensor out = new_output(c.a, {c.groups, c.cols, c.depth}, c.a.scalar_type());
  if (out.numel() == 0) return out;
  const Launch launch(c.a);
  const GroupedWgradCall call{device_rows(c.w),
                              device_rows(c.a),
                              int_array(c.offsets),
                              int_array(c.gather),
                              c.slots,
                              c.a_rows,
                              c.groups,
                              c.cols,
                              c.depth,
                              out.data_ptr()};
  dispatch_dtype(c.a.scalar_type(), kOp, [&]<class T>() { grouped_wgrad<T>(call, launch.stream); });
  launch.check();
  return out;
}

ExpertBlock expert_block(const ExpertsCall& c) {
  ExpertBlock b{};
  fill_routing(&b, c);
  b.gate_up = device_matrices(c.gate_up), b.down = device_matrices(c.down);
  return b;
}

// hidden: stored if it has a value.
Tensor forward(const ExpertsCall& c, const OptTensor& hidden) {
  const Tensor out = new_output(c.x, {c.tokens, c.dim}, c.x.scalar_type());
  if (out.numel() == 0) return out;
  const Launch launch(c.x);
  DeviceMemory memory(c.x);
  dispatch_dtype(c.x.scalar_type(), "moe_swiglu_mlp", [&]<class T>() {
    experts_forward<T>(expert_block(c), hidden ? hidden->data_ptr() : nullptr, out.data_ptr(), {},
                       memory.room(), launch.stream);
  });
  launch.check();
  return out;
}

Tensor moe_swiglu_mlp_op(Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight,
                         bool /*allow_sentinel*/) {
  return forward(check_experts("moe_swiglu_mlp", x, gate_up, down, index, weight), {});
}

std::tuple<Tensor, Tensor> moe_swiglu_mlp_train_op(Tensor x, Tensor gate_up, Tensor down,
                                                   Tensor index, Tensor weight,
                                                   bool /*allow_sentinel*/) {
  const ExpertsCall c = check_experts("moe_swiglu_mlp", x, gate_up, down, index, weight);
  const Tensor hidden = new_output(c.x, {c.tokens * c.k, 2 * c.ffn}, c.x.scalar_type());
  return {forward(c, hidden), hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_swiglu_mlp_backward_op(
    Tensor grad_out, Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight,
    Tensor hidden, bool of_x, bool of_gate_up, bool of_down, bool of_weight,
    bool /*allow_sentinel*/) {
  constexpr auto kOp = "moe_swiglu_mlp_backward";
  const ExpertsCall c = check_experts(kOp, x, gate_up, down, index, weight);
  const Tensor grad = check_rows_like(kOp, "grad_out", grad_out, c, c.tokens, c.dim, "[T, d]");
  const Tensor pre = torch::stable::contiguous(
      check_rows_like(kOp, "hidden", hidden, c, c.tokens * c.k, 2 * c.ffn, "[S, 2 f]"));
  const Tensor grad_x = wanted_like(c.x, of_x, {c.tokens, c.dim});
  const Tensor grad_gate_up = wanted_like(c.x, of_gate_up, {c.experts, 2 * c.ffn, c.dim});
  const Tensor grad_down = wanted_like(c.x, of_down, {c.experts, c.dim, c.ffn});
  const Tensor grad_weight = wanted_like(c.weight, of_weight, {c.tokens, c.k});
  const ExpertGradients out{data_if(of_x, grad_x), data_if(of_gate_up, grad_gate_up),
                            data_if(of_down, grad_down),
                            static_cast<float*>(data_if(of_weight, grad_weight))};
  const Launch launch(c.x);
  DeviceMemory memory(c.x);
  dispatch_dtype(c.x.scalar_type(), kOp, [&]<class T>() {
    experts_backward<T>(expert_block(c), device_rows(grad), pre.data_ptr(), out, {}, memory.room(),
                        launch.stream);
  });
  launch.check();
  return {grad_x, grad_gate_up, grad_down, grad_weight};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("grouped_gemm", TORCH_BOX(&tenfold::cuda::grouped_gemm_op));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&tenfold::cuda::grouped_gemm_wgrad_op));
  m.impl("moe_swiglu_mlp", TORCH_BOX(&tenfold::cuda::moe_swiglu_mlp_op));
  m.impl("moe_swiglu_mlp_train", TORCH_BOX(&tenfold::cuda::moe_swiglu_mlp_train_op));
  m.impl("moe_swiglu_mlp_backward", TORCH_BOX(&tenfold::cuda::moe_swiglu_mlp_backward_op));
}
