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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
moe_lora_experts_backward_op(Tensor grad_out, Tensor x, Tensor wg, Tensor wu, Tensor wd,
                             Tensor a_gate, Tensor a_up, Tensor a_down, Tensor b_gate, Tensor b_up,
                             Tensor b_down, double scale, Tensor index, Tensor weight,
                             Tensor hidden_in, Tensor low_in, int64_t wanted, bool allow_sentinel) {
  constexpr auto kOp = "moe_lora_experts_backward";
  const LoraCall c = check_lora_experts(kOp, x, {wg, wu, wd}, {a_gate, a_up, a_down},
                                        {b_gate, b_up, b_down}, scale, index, weight);
  const int64_t s = c.tokens * c.k, f = c.ffn, r = c.rank, n = c.experts, d = c.dim;
  const Tensor grad = check_rows_like(kOp, "grad_out", grad_out, c, c.tokens, d, "[T, d]");
  const Tensor hidden =
      torch::stable::contiguous(check_rows_like(kOp, "hidden", hidden_in, c, s, 2 * f, "[S, 2 f]"));
  const Tensor low =
      torch::stable::contiguous(check_rows_like(kOp, "low", low_in, c, s, 2 * r, "[S, 2 r]"));
  const LoraExperts e(kOp, c, allow_sentinel);
  const auto like = [&](int bit, const Tensor& t, std::initializer_list<int64_t> sizes) {
    return wanted_like(t, wanted >> bit & 1, sizes);
  };
  const Tensor of_x = like(0, c.x, {c.tokens, d});
  const Tensor base[3] = {like(1, c.x, {f, d}), like(2, c.x, {f, d}), like(3, c.x, {d, f})};
  const Tensor a[3] = {like(4, c.x, {n, r, d}), like(5, c.x, {n, r, d}), like(6, c.x, {n, r, f})};
  const Tensor b[3] = {like(7, c.x, {n, f, r}), like(8, c.x, {n, f, r}), like(9, c.x, {n, d, r})};
  const Tensor of_weight = like(10, c.weight, {c.tokens, c.k});
  const auto data = [&](int bit, const Tensor& t) {
    return wanted >> bit & 1 ? t.data_ptr() : nullptr;
  };
  LoraExperts::Gradients out{};
  out.x = data(0, of_x);
  for (int i = 0; i < 3; ++i) {
    out.base[i] = data(1 + i, base[i]);
    out.a[i] = data(4 + i, a[i]), out.b[i] = data(7 + i, b[i]);
  }
  out.weight = static_cast<float*>(data(10, of_weight));
  if (out.weight != nullptr) std::fill_n(out.weight, s, 0.0f);
  e.backward(grad, hidden, low, out);
  return {of_x, base[0], base[1], base[2], a[0], a[1], a[2], b[0], b[1], b[2], of_weight};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("moe_lora_swiglu_mlp", TORCH_BOX(&tenfold::cpu::moe_lora_swiglu_mlp_op));
  m.impl("moe_lora_experts", TORCH_BOX(&tenfold::cpu::moe_lora_experts_op));
  m.impl("moe_lora_experts_train", TORCH_BOX(&tenfold::cpu::moe_lora_experts_train_op));
  m.impl("moe_lora_experts_backward", TORCH_BOX(&tenfold::cpu::moe_lora_experts_backward_op));
}
