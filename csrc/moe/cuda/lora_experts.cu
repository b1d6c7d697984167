// SPDX-License-Identifier: Apache-2.0
// CUDA registration of the LoRA form of the expert block.
#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "core/stream.h"
#include "moe/cuda/device_block.h"

namespace tenfold::cuda {
namespace {

LoraBlock lora_block(const LoraCall& c) {
  LoraBlock b{};
  fill_routing(&b, c);
  for (int i = 0; i < 3; ++i) {
    b.base[i] = device_rows(c.base[i]);
    b.a[i] = device_matrices(c.a[i]), b.b[i] = device_matrices(c.b[i]);
  }
  b.rank = c.rank, b.scale = c.scale;
  return b;
}

// hidden: stored if it has a value.
Tensor forward(const LoraCall& c, const OptTensor& hidden, const Tensor& low) {
  const Tensor out = new_output(c.x, {c.tokens, c.dim}, c.x.scalar_type());
  if (out.numel() == 0) return out;
  const Launch launch(c.x);
  DeviceMemory memory(c.x);
  dispatch_dtype(c.x.scalar_type(), "moe_lora_swiglu_mlp", [&]<class T>() {
    lora_forward<T>(lora_block(c), hidden ? hidden->data_ptr() : nullptr, low.data_ptr(),
                    out.data_ptr(), {}, memory.room(), launch.stream);
  });
  launch.check();
  return out;
}

Tensor new_low(const LoraCall& c) {
  return new_output(c.x, {c.tokens * c.k, 2 * c.rank}, c.x.scalar_type());
}

Tensor moe_lora_experts_op(Tensor x, Tensor wg, Tensor wu, Tensor wd, Tensor a_gate, Tensor a_up,
                           Tensor a_down, Tensor b_gate, Tensor b_up, Tensor b_down, double scale,
                           Tensor index, Tensor weight, bool /*allow_sentinel*/) {
  const LoraCall c =
      check_lora_experts("moe_lora_swiglu_mlp", x, {wg, wu, wd}, {a_gate, a_up, a_down},
                         {b_gate, b_up, b_down}, scale, index, weight);
  return forward(c, {}, new_low(c));
}

Tensor moe_lora_swiglu_mlp_op(Tensor x, Tensor wg, Tensor wu, Tensor wd, std::vector<Tensor> a,
                              std::vector<Tensor> b, double scale, Tensor index, Tensor weight,
                              bool allow_sentinel) {
  check_three("lora_a", a);
  check_three("lora_b", b);
  return moe_lora_experts_op(x, wg, wu, wd, a[0], a[1], a[2], b[0], b[1], b[2], scale, index,
                             weight, allow_sentinel);
}

std::tuple<Tensor, Tensor, Tensor> moe_lora_experts_train_op(
    Tensor x, Tensor wg, Tensor wu, Tensor wd, Tensor a_gate, Tensor a_up, Tensor a_down,
    Tensor b_gate, Tensor b_up, Tensor b_down, double scale, Tensor index, Tensor weight,
    bool /*allow_sentinel*/) {
  const LoraCall c =
      check_lora_experts("moe_lora_swiglu_mlp", x, {wg, wu, wd}, {a_gate, a_up, a_down},
                         {b_gate, b_up, b_down}, scale, index, weight);
  const Tensor hidden = new_output(c.x, {c.tokens * c.k, 2 * c.ffn}, c.x.scalar_type());
  const Tensor low = new_low(c);
  return {forward(c, hidden, low), hidden, low};
}

LoraBackward::Results moe_lora_experts_backward_op(Tensor grad_out, Tensor x, Tensor wg, Tensor wu,
                                                   Tensor wd, Tensor a_gate, Tensor a_up,
                                                   Tensor a_down, Tensor b_gate, Tensor b_up,
                                                   Tensor b_down, double scale, Tensor index,
                                                   Tensor weight, Tensor hidden, Tensor low,
                                                   int64_t wanted, bool /*allow_sentinel*/) {
  constexpr auto kOp = "moe_lora_experts_backward";
  const LoraCall c = check_lora_experts(kOp, x, {wg, wu, wd}, {a_gate, a_up, a_down},
                                        {b_gate, b_up, b_down}, scale, index, weight);
  const LoraBackward g = check_lora_backward(kOp, c, grad_out, hidden, low, wanted);
  LoraGradients out{};
  out.x = g.data(0);
  for (int i = 0; i < 3; ++i)
    out.base[i] = g.data(1 + i), out.a[i] = g.data(4 + i), out.b[i] = g.data(7 + i);
  out.weight = static_cast<float*>(g.data(10));
  const Launch launch(c.x);
  DeviceMemory memory(c.x);
  dispatch_dtype(c.x.scalar_type(), kOp, [&]<class T>() {
    lora_backward<T>(lora_block(c), device_rows(g.grad), g.hidden.data_ptr(), g.low.data_ptr(), out,
                     {}, memory.room(), launch.stream);
  });
  launch.check();
  return g.results();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("moe_lora_swiglu_mlp", TORCH_BOX(&tenfold::cuda::moe_lora_swiglu_mlp_op));
  m.impl("moe_lora_experts", TORCH_BOX(&tenfold::cuda::moe_lora_experts_op));
  m.impl("moe_lora_experts_train", TORCH_BOX(&tenfold::cuda::moe_lora_experts_train_op));
  m.impl("moe_lora_experts_backward", TORCH_BOX(&tenfold::cuda::moe_lora_experts_backward_op));
}
