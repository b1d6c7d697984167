// SPDX-License-Identifier: Apache-2.0
// CUDA registration of swiglu and gated_gelu.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "norm/cuda/gated_act_kernel.cuh"
#include "norm/gated_act_ops.h"

namespace tenfold::cuda {
namespace {

void run(const char* op, const GatedArgs& a, ScalarType dtype, Gate gate, const Launch& launch) {
  check_grid(op, a.rows * gated_parts(a.cols, to_dtype(dtype)));
  dispatch_dtype(dtype, op, [&]<class T>() { launch_gated_act<T>(a, gate, launch.stream); });
  launch.check();
}

Tensor run_forward(const char* op, const GatedCall& c, const Launch& launch) {
  const RowShape shape = joined_rows(c.shape, {c.a.stride, c.b.stride, c.out.stride});
  GatedArgs a{};
  a.a = c.a.data, a.b = c.b.data, a.out = c.out.data, a.rows = shape.rows, a.cols = shape.cols;
  a.a_stride = c.a.stride, a.b_stride = c.b.stride, a.out_stride = c.out.stride;
  run(op, a, c.a.t.scalar_type(), c.gate, launch);
  return c.out.t;
}

Tensor gated_act_op(Tensor a, Tensor b, int64_t act) {
  constexpr auto kOp = "gated_act";
  const Launch launch(a);
  return run_forward(kOp, check_gated(kOp, "a", "b", gate_of(kOp, act), nullptr, a, b), launch);
}

void gated_act_out_op(Tensor out, Tensor a, Tensor b, int64_t act) {
  constexpr auto kOp = "gated_act_";
  const Launch launch(a);
  run_forward(kOp, check_gated(kOp, "a", "b", gate_of(kOp, act), &out, a, b), launch);
}

Tensor swiglu_op(Tensor gate, Tensor up) {
  constexpr auto kOp = "swiglu";
  const Launch launch(gate);
  return run_forward(kOp, check_gated(kOp, "gate", "up", Gate::silu, nullptr, gate, up), launch);
}

void swiglu_out_op(Tensor out, Tensor gate, Tensor up) {
  constexpr auto kOp = "swiglu_";
  const Launch launch(gate);
  run_forward(kOp, check_gated(kOp, "gate", "up", Gate::silu, &out, gate, up), launch);
}

Tensor gated_gelu_op(Tensor a, Tensor b, std::string approximate) {
  constexpr auto kOp = "gated_gelu";
  const Launch launch(a);
  const Gate gate = gelu_of(kOp, approximate);
  return run_forward(kOp, check_gated(kOp, "a", "b", gate, nullptr, a, b), launch);
}

void gated_gelu_out_op(Tensor out, Tensor a, Tensor b, std::string approximate) {
  constexpr auto kOp = "gated_gelu_";
  const Launch launch(a);
  const Gate gate = gelu_of(kOp, approximate);
  run_forward(kOp, check_gated(kOp, "a", "b", gate, &out, a, b), launch);
}

std::tuple<Tensor, Tensor> gated_act_backward_op(Tensor grad, Tensor a_in, Tensor b_in, int64_t act,
                                                 bool of_a, bool of_b) {
  const Launch launch(a_in);
  const GatedGradCall c = check_gated_backward(grad, a_in, b_in, act, of_a, of_b);
  if ((!of_a && !of_b) || c.shape.rows * c.shape.cols == 0) return {c.da, c.db};
  const RowShape shape = joined_rows(c.shape, {c.dout.stride, c.a.stride, c.b.stride});
  GatedArgs a{};
  a.dout = c.dout.data, a.a = c.a.data, a.b = c.b.data;
  a.da = of_a ? c.da.data_ptr() : nullptr, a.db = of_b ? c.db.data_ptr() : nullptr;
  a.rows = shape.rows, a.cols = shape.cols, a.out_stride = shape.cols;
  a.dout_stride = c.dout.stride, a.a_stride = c.a.stride, a.b_stride = c.b.stride;
  run("gated_act_backward", a, a_in.scalar_type(), c.gate, launch);
  return {c.da, c.db};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("gated_act", TORCH_BOX(&tenfold::cuda::gated_act_op));
  m.impl("gated_act_", TORCH_BOX(&tenfold::cuda::gated_act_out_op));
  m.impl("swiglu", TORCH_BOX(&tenfold::cuda::swiglu_op));
  m.impl("swiglu_", TORCH_BOX(&tenfold::cuda::swiglu_out_op));
  m.impl("gated_gelu", TORCH_BOX(&tenfold::cuda::gated_gelu_op));
  m.impl("gated_gelu_", TORCH_BOX(&tenfold::cuda::gated_gelu_out_op));
  m.impl("gated_act_backward", TORCH_BOX(&tenfold::cuda::gated_act_backward_op));
}
