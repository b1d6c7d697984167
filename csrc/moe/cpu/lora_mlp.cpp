// SPDX-License-Identifier: Apache-2.0
// CPU registration of the LoRA form of the expert block.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "moe/cpu/lora_experts.h"

namespace tenfold::cpu {
namespace {

Tensor moe_lora_experts_op(Tensor x, Tensor wg, Tensor wu, Tensor wd, Tensor a_gate, Tensor a_up,
                           Tensor a_down, Tensor b_gate, Tensor b_up, Tensor b_down, double scale,
                           Tensor index, Tensor weight, bool allow_sentinel) {
  constexpr auto kOp = "moe_lora_swiglu_mlp";
  const LoraCall c = check_lora_experts(kOp, x, {wg, wu, wd}, {a_gate, a_up, a_down},
                                        {b_gate, b_up, b_down}, scale, index, weight);
  const LoraExperts e(kOp, c, allow_sentinel);
  const Tensor out = new_output(c.x, {c.tokens, c.dim}, c.x.scalar_type());
  if (out.numel() == 0) return out;
  const Floats low{floats_for(e.num_slots() * 2 * c.rank, to_dtype(c.x.scalar_type()))};
  e.forward(nullptr, low[0], out.data_ptr());
  return out;
}

Tensor moe_lora_swiglu_mlp_op(Tensor x, Tensor wg, Tensor wu, Tensor wd, std::vector<Tensor> a,
                              std::vector<Tensor> b, double scale, Tensor index, Tensor weight,
                              bool allow_sentinel) {
  check_three("lora_a", a);
  check_three("lora_b", b);
  return moe_lora_experts_op(x, wg, wu, wd, a[0], a[1], a[2], b[0], b[1], b[2], scale, index,
                             weight, allow_sentinel);
}

std::tuple<Tensor, Tensor, Tensor> moe_lora_experts_train_op(Tensor x, Tensor wg, Tensor wu,
                                                             Tensor wd, Tensor a_gate, Tensor a_up,
                                                             Tensor a_down, Tensor b_gate,
                                                             Tensor b_up, Tensor b_down,
                                                             double scale, Tensor index,
                                                             Tensor weight, bool allow_sentinel) {
  constexpr auto kOp = "moe_lora_swiglu_mlp";
  const LoraCall c = check_lora_experts(kOp, x, {wg, wu, wd}, {a_gate, a_up, a_down},
                                        {b_gate, b_up, b_down}, scale, index, weight);
  const LoraExperts e(kOp, c, allow_sentinel);
  const Tensor out = new_output(c.x, {c.tokens, c.dim}, c.x.scalar_type());
  const Tensor hidden = new_output(c.x, {e.num_slots(), 2 * c.ffn}, c.x.scalar_type());
  const Tensor low = new_output(c.x, {e.num_slots(), 2 * c.rank}, c.x.scalar_type());
  if (out.numel() > 0) e.forward(hidden.data_ptr(), low.data_ptr(), out.data_ptr());
  return {out, hidden, low};
}

LoraBackward::Results moe_lora_experts_backward_op(Tensor grad_out, Tensor x, Tensor wg, Tensor wu,
                                                   Tensor wd, Tensor a_gate, Tensor a_up,
                                                   Tensor a_down, Tensor b_gate, Tensor b_up,
                                                   Tensor b_down, double scale, Tensor index,
                                                   Tensor weight, Tensor hidden, Tensor low,
                                                   int64_t wanted, bool allow_sentinel) {
  constexpr auto kOp = "moe_lora_experts_backward";
  const LoraCall c = check_lora_experts(kOp, x, {wg, wu, wd}, {a_gate, a_up, a_down},
                                        {b_gate, b_up, b_down}, scale, index, weight);
  const LoraBackward g = check_lora_backward(kOp, c, grad_out, hidden, low, wanted);
  const LoraExperts e(kOp, c, allow_sentinel);
  LoraExperts::Gradients out{};
  out.x = g.data(0);
  for (int i = 0; i < 3; ++i)
    out.base[i] = g.data(1 + i), out.a[i] = g.data(4 + i), out.b[i] = g.data(7 + i);
  out.weight = static_cast<float*>(g.data(10));
  if (out.weight != nullptr) std::fill_n(out.weight, e.num_slots(), 0.0f);
  e.backward(g.grad, g.hidden, g.low, out);
  return g.results();
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("moe_lora_swiglu_mlp", TORCH_BOX(&tenfold::cpu::moe_lora_swiglu_mlp_op));
  m.impl("moe_lora_experts", TORCH_BOX(&tenfold::cpu::moe_lora_experts_op));
  m.impl("moe_lora_experts_train", TORCH_BOX(&tenfold::cpu::moe_lora_experts_train_op));
  m.impl("moe_lora_experts_backward", TORCH_BOX(&tenfold::cpu::moe_lora_experts_backward_op));
}
