// SPDX-License-Identifier: Apache-2.0
// CUDA registration of moe_gate, moe_gate_linear and their backward. Values of index are not read.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "moe/cuda/gate_linear_kernel.cuh"
#include "moe/cuda/router_outer_kernel.cuh"
#include "moe/cuda/sum_parts.cuh"
#include "moe/gate_ops.h"

namespace tenfold::cuda {
namespace {

template <class T>
GateArgs args_of(const GateCall& c) {
  const GateParams p = c.params();
  return gate_args<T>(p.logits, c.tokens, p.stride, p.experts, p.k, p.renormalize, p.weight,
                      p.index);
}

std::tuple<Tensor, Tensor> moe_gate_op(Tensor logits, int64_t k, bool renormalize) {
  constexpr auto kOp = "moe_gate";
  const GateCall c = check_gate(kOp, logits, k, renormalize);
  const Launch launch(c.logits);
  dispatch_dtype(c.logits.scalar_type(), kOp, [&]<class T>() {
    const GateArgs a = args_of<T>(c);
    check_grid(kOp, gate_blocks(a.tokens, a.lanes));
    launch_gate<T>(a, launch.stream);
  });
  launch.check();
  return {c.weight, c.index};
}

void run_gate_grad(const char* op, const GateGradCall& c) {
  const Launch launch(c.logits);
  dispatch_dtype(c.logits.scalar_type(), op, [&]<class T>() {
    const GateGradParams p = c.params();
    GateGradArgs a{};
    a.logits = p.logits, a.tokens = c.logits.sizes()[0], a.stride = p.stride;
    a.experts = p.experts, a.k = p.k, a.renormalize = p.renormalize;
    a.grad = p.grad, a.weight = p.weight, a.also = p.also, a.out = p.out;
    a.index = {c.index.kept.data_ptr(), c.index.kept.scalar_type() == ScalarType::Long, 1};
    a = with_shape<T>(a);
    check_grid(op, gate_blocks(a.tokens, a.lanes));
    launch_gate_grad<T>(a, launch.stream);
  });
  launch.check();
}

Tensor moe_gate_backward_op(Tensor grad_weight, Tensor logits, Tensor weight, Tensor index,
                            bool renormalize) {
  constexpr auto kOp = "moe_gate_backward";
  const GateGradCall c =
      check_gate_grad(kOp, grad_weight, logits, weight, index, renormalize, std::nullopt);
  run_gate_grad(kOp, c);
  return c.out;
}

// Calls f<dtype of x, dtype of w>().
template <class F>
void dispatch_router(const RouterCall& r, const char* op, const F& f) {
  dispatch_dtype(r.x.scalar_type(), op, [&]<class T>() {
    if (r.w.scalar_type() == r.x.scalar_type()) return f.template operator()<T, T>();
    f.template operator()<T, float>();
  });
}

std::tuple<Tensor, Tensor, Tensor> moe_gate_linear_op(Tensor x, Tensor w_router, int64_t k,
                                                      bool renormalize) {
  constexpr auto kOp = "moe_gate_linear";
  const RouterCall r = check_router(kOp, x, w_router);
  check_k(kOp, k, r.experts);
  const Launch launch(r.x);
  const Tensor logits = new_output(r.x, {r.tokens, r.experts}, ScalarType::Float);
  const GateCall c = check_gate(kOp, logits, k, renormalize);
  check_grid(kOp, (r.tokens + kRouterGroups - 1) / kRouterGroups);
  const RouterParams p = r.params(data_as<float>(logits));
  dispatch_router(r, kOp, [&]<class T, class W>() {
    RouterArgs a{};
    a.x = p.x, a.w = p.w, a.tokens = r.tokens, a.dim = r.dim, a.experts = r.experts;
    a.x_stride = p.x_stride, a.w_stride = p.w_stride;
    a.logits = p.logits;
    a.gate = args_of<float>(c);
    launch_router<T, W>(with_shape<T, W>(a), launch.stream);
  });
  launch.check();
  return {logits, c.weight, c.index};
}

template <class B, class Out>
void run_outer(const char* op, const OuterArgs& args, cudaStream_t stream) {
  const OuterArgs a = with_tiles<B, Out>(args);
  check_grid(op, outer_blocks(a));
  launch_outer<B, Out>(a, stream);
}

std::tuple<Tensor, Tensor> moe_gate_linear_backward_op(OptTensor grad_logits, OptTensor grad_weight,
                                                       Tensor x, Tensor w_router, Tensor logits,
                                                       Tensor weight, Tensor index,
                                                       bool renormalize, bool of_x, bool of_w) {
  constexpr auto kOp = "moe_gate_linear_backward";
  const RouterCall r = check_router(kOp, x, w_router);
  const RouterGradCall c =
      check_router_grad(kOp, r, grad_logits, grad_weight, logits, weight, index, renormalize);
  if (c.gate) run_gate_grad(kOp, *c.gate);
  const Launch launch(r.x);
  const auto new_grad = [&](bool wanted, int64_t rows, const Tensor& like) {
    return wanted ? new_output(r.x, {rows, r.dim}, like.scalar_type())
                  : new_output(r.x, {0}, like.scalar_type());
  };
  const Tensor grad_x = new_grad(of_x, r.tokens, x), grad_w = new_grad(of_w, r.experts, w_router);
  const RouterParams p = r.params(nullptr);
  OuterArgs a{};
  a.a = data_as<float>(c.grad), a.cols = r.dim;
  dispatch_router(r, kOp, [&]<class T, class W>() {
    if (of_x) {
      a.a_row = r.experts, a.a_step = 1, a.rows = r.tokens;
      a.depth = a.strip = r.experts;
      a.b = p.w, a.b_stride = p.w_stride, a.out = grad_x.data_ptr();
      run_outer<W, T>(kOp, a, launch.stream);
    }
    if (!of_w) return;
    a.a_row = 1, a.a_step = r.experts, a.rows = r.experts;
    a.depth = r.tokens, a.strip = kOuterStrip;
    a.b = p.x, a.b_stride = p.x_stride;
    const int64_t strips = outer_strips(a);
    const Tensor parts = new_output(r.x, {strips, r.experts, r.dim}, ScalarType::Float);
    a.out = parts.data_ptr();
    run_outer<T, float>(kOp, a, launch.stream);
    launch_sum_parts<W>(
        part_args(data_as<float>(parts), 1, strips, r.experts * r.dim, grad_w.data_ptr()),
        launch.stream);
  });
  launch.check();
  return {grad_x, grad_w};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("moe_gate", TORCH_BOX(&tenfold::cuda::moe_gate_op));
  m.impl("moe_gate_backward", TORCH_BOX(&tenfold::cuda::moe_gate_backward_op));
  m.impl("moe_gate_linear", TORCH_BOX(&tenfold::cuda::moe_gate_linear_op));
  m.impl("moe_gate_linear_backward", TORCH_BOX(&tenfold::cuda::moe_gate_linear_backward_op));
}
