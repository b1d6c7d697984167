// SPDX-License-Identifier: Apache-2.0
// CPU registration of moe_swiglu_mlp and its gradients. Forward: one product of gate and up with
// the activation as it ends, one of down whose rows, times their routing weights, are summed token
// by token. Backward of G = the gradient of the result, at a slot of token t and expert e (y is
// never stored):
//   y' = G[t] W_d;  dweight = <y', a>;  [dg, du] by the activation's gradient;
//   dW_d += G[t]^T (w a);  dW_gu += [dg, du]^T x[t];  dx[t] += [dg, du] W_gu.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/parallel.h"
#include "moe/cpu/routing.h"

namespace tenfold::cpu {
namespace {

// Sorted slots of a call.
struct Experts {
  const ExpertsCall& c;
  Isa isa = active_isa();
  Dtype dtype = to_dtype(c.x.scalar_type());
  int64_t size = dtype_size(dtype);
  SortedSlots slots;
  std::vector<float> weights = sorted_weights(c, slots);
  Groups groups = groups_of(slots);

  Experts(const char* op, const ExpertsCall& c, bool allow_sentinel)
      : c(c), slots(sorted_slots(op, c, allow_sentinel)) {}

  char* at(void* rows, int64_t col) const { return static_cast<char*>(rows) + col * size; }
  int64_t num_slots() const { return static_cast<int64_t>(slots.order.size()); }
};

// hidden [S, 2 f] is stored unless null.
void forward(const Experts& e, void* hidden, void* out) {
  const ExpertsCall& c = e.c;
  const int64_t f = c.ffn;
  const Floats memory{floats_for(e.slots.routed() * f, e.dtype)};
  void* const a = memory[0];
  const MoeRows x = rows_of(c.x, &e.slots);
  const GroupedProduct up{e.dtype, c.dim,
                          f,       2,
                          {x, x},  {matrices_of(c.gate_up, true), matrices_of(c.gate_up, true, f)}};
  grouped_product(e.isa, up, e.groups, [&](const ProductTile& t) {
    MoeSwiglu s{};
    s.gate = t.sums[0], s.up = t.sums[1];
    s.dtype = e.dtype;
    s.a = e.at(a, t.col), s.a_stride = f;
    if (hidden != nullptr) {
      s.g = e.at(hidden, t.col), s.u = e.at(hidden, f + t.col);
      s.g_stride = 2 * f;
    }
    TENFOLD_ISA_CALL_AS(e.isa, moe_swiglu, t.rows, s);
  });
  const GroupedProduct down{e.dtype, f, c.dim, 1, {{a, f}, {}}, {matrices_of(c.down, true), {}}};
  product_to_tokens(e.isa, down, e.slots, c.tokens, c.k, e.weights.data(), nullptr, out);
}

struct ExpertGradients {
  void *x, *gate_up, *down;  // null: not wanted
  float* weight;
};

void backward(const Experts& e, const Tensor& grad, const Tensor& hidden,
              const ExpertGradients& out) {
  const ExpertsCall& c = e.c;
  const int64_t f = c.ffn, s = e.num_slots();
  const MoeRows g = rows_of(grad, &e.slots);
  const GroupedProduct back{e.dtype, c.dim, f, 1, {g, {}}, {matrices_of(c.down, false), {}}};
  const int64_t blocks = product_blocks(back, e.groups, f);
  const Floats memory{floats_for(s * 2 * f, e.dtype), floats_for(s * f, e.dtype), blocks * s};
  void *const both = memory[0], *const wa = memory[1];
  void* const pre = hidden.data_ptr();
  const int64_t pre_stride = 2 * f;
  grouped_product(e.isa, back, e.groups, [&](const ProductTile& t) {
    MoeSwigluBackward b{};
    b.sums = t.sums[0];
    b.factor = e.weights.data();
    b.dtype = e.dtype;
    b.g = e.at(pre, t.col), b.u = e.at(pre, f + t.col);
    b.dg = e.at(both, t.col), b.du = e.at(both, f + t.col);
    b.g_stride = pre_stride;
    b.wa = e.at(wa, t.col), b.wa_stride = f;
    b.dot = memory[2] + t.block * s;
    TENFOLD_ISA_CALL_AS(e.isa, moe_swiglu_backward, t.rows, b);
  });
  if (out.weight != nullptr) {
    std::fill_n(out.weight, s, 0.0f);
    add_weight_gradient(e.slots, memory[2], blocks, out.weight);
  }
  const MoeRows d_hidden{both, 2 * f};
  if (out.gate_up != nullptr)
    grouped_wgrad(e.isa, e.dtype, d_hidden, 2 * f, rows_of(c.x, &e.slots), c.dim, e.groups,
                  out.gate_up);
  if (out.down != nullptr) grouped_wgrad(e.isa, e.dtype, g, c.dim, {wa, f}, f, e.groups, out.down);
  if (out.x == nullptr) return;
  const GroupedProduct down{e.dtype, 2 * f,          c.dim,
                            1,       {d_hidden, {}}, {matrices_of(c.gate_up, false), {}}};
  product_to_tokens(e.isa, down, e.slots, c.tokens, c.k, nullptr, nullptr, out.x);
}

Tensor moe_swiglu_mlp_op(Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight,
                         bool allow_sentinel) {
  constexpr auto kOp = "moe_swiglu_mlp";
  const ExpertsCall c = check_experts(kOp, x, gate_up, down, index, weight);
  const Experts e(kOp, c, allow_sentinel);
  const Tensor out = new_output(c.x, {c.tokens, c.dim}, c.x.scalar_type());
  if (out.numel() > 0) forward(e, nullptr, out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor> moe_swiglu_mlp_train_op(Tensor x, Tensor gate_up, Tensor down,
                                                   Tensor index, Tensor weight,
                                                   bool allow_sentinel) {
  constexpr auto kOp = "moe_swiglu_mlp";
  const ExpertsCall c = check_experts(kOp, x, gate_up, down, index, weight);
  const Experts e(kOp, c, allow_sentinel);
  const Tensor out = new_output(c.x, {c.tokens, c.dim}, c.x.scalar_type());
  const Tensor hidden = new_output(c.x, {e.num_slots(), 2 * c.ffn}, c.x.scalar_type());
  if (out.numel() > 0) forward(e, hidden.data_ptr(), out.data_ptr());
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_swiglu_mlp_backward_op(
    Tensor grad_out, Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight,
    Tensor hidden, bool of_x, bool of_gate_up, bool of_down, bool of_weight, bool allow_sentinel) {
  constexpr auto kOp = "moe_swiglu_mlp_backward";
  const ExpertsCall c = check_experts(kOp, x, gate_up, down, index, weight);
  const Tensor grad = check_rows_like(kOp, "grad_out", grad_out, c, c.tokens, c.dim, "[T, d]");
  const Tensor pre = torch::stable::contiguous(
      check_rows_like(kOp, "hidden", hidden, c, c.tokens * c.k, 2 * c.ffn, "[S, 2 f]"));
  const Experts e(kOp, c, allow_sentinel);
  const Tensor grad_x = wanted_like(c.x, of_x, {c.tokens, c.dim});
  const Tensor grad_gate_up = wanted_like(c.x, of_gate_up, {c.experts, 2 * c.ffn, c.dim});
  const Tensor grad_down = wanted_like(c.x, of_down, {c.experts, c.dim, c.ffn});
  const Tensor grad_weight = wanted_like(c.weight, of_weight, {c.tokens, c.k});
  backward(e, grad, pre,
           {of_x ? grad_x.data_ptr() : nullptr, of_gate_up ? grad_gate_up.data_ptr() : nullptr,
            of_down ? grad_down.data_ptr() : nullptr,
            of_weight ? data_as<float>(grad_weight) : nullptr});
  return {grad_x, grad_gate_up, grad_down, grad_weight};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("moe_swiglu_mlp", TORCH_BOX(&tenfold::cpu::moe_swiglu_mlp_op));
  m.impl("moe_swiglu_mlp_train", TORCH_BOX(&tenfold::cpu::moe_swiglu_mlp_train_op));
  m.impl("moe_swiglu_mlp_backward", TORCH_BOX(&tenfold::cpu::moe_swiglu_mlp_backward_op));
}
