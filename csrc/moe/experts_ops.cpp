// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of the products of experts and of whole expert blocks.
#include "moe/experts_ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "core/contiguous.h"

namespace tenfold {
namespace {

constexpr int64_t kMostSlots = int64_t{1} << 31;

#define TENFOLD_CHECK_RUNTIME(cond, ...) TENFOLD_CHECK_KIND(ErrorKind::runtime, cond, __VA_ARGS__)

void check_device(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                  const Tensor& b) {
  TENFOLD_CHECK_RUNTIME(device_str(a) == device_str(b), "tenfold::", op, ": ", b_name,
                        " must be on the device of ", a_name, " (", device_str(a), "), got ",
                        device_str(b));
}

// A float tensor of the dtype and device of `like`.
void check_like(const char* op, const char* like_name, const Tensor& like, const char* name,
                const Tensor& t) {
  check_same_dtype(op, like_name, like, name, t);
  check_device(op, like_name, like, name, t);
}

void check_index_dtype(const char* op, const char* name, const Tensor& t) {
  const auto s = t.scalar_type();
  TENFOLD_CHECK_INDEX(s == ScalarType::Int || s == ScalarType::Long, "tenfold::", op, ": ", name,
                      " must be int32 or int64, got ", dtype_name(s));
}

void check_ints(const char* op, const char* name, const Tensor& t, const char* a_name,
                const Tensor& a, const char* layout) {
  check_index_dtype(op, name, t);
  check_device(op, a_name, a, name, t);
  check_dim(op, name, t, 1, layout);
}

// Rows of `name` that groups multiply, and their offsets.
void check_groups(const char* op, GroupedCall* c, const char* name, const Tensor& offsets,
                  const OptTensor& gather) {
  check_ints(op, "offsets", offsets, name, c->a, "[groups + 1]");
  TENFOLD_CHECK_VALUE(offsets.numel() >= 1, "tenfold::", op, ": offsets must be [groups + 1], got ",
                      shape_str(offsets));
  c->offsets = as_contiguous(offsets);
  c->groups = offsets.numel() - 1;
  c->a_rows = c->a.sizes()[0];
  c->slots = c->a_rows;
  if (gather) {
    check_ints(op, "gather", *gather, name, c->a, "[S]");
    c->gather = as_contiguous(*gather);
    c->slots = gather->numel();
  }
  TENFOLD_CHECK_VALUE(c->slots < kMostSlots && c->a_rows < kMostSlots, "tenfold::", op,
                      ": fewer than 2^31 rows are supported, got ", c->slots);
}

RoutedCall check_routing(const char* op, const Tensor& x, const Tensor& index,
                         const Tensor& weight) {
  check_index_dtype(op, "index", index);
  TENFOLD_CHECK_TYPE(weight.scalar_type() == ScalarType::Float, "tenfold::", op,
                     ": weight must be float32, got ", dtype_name(weight.scalar_type()));
  check_device(op, "x", x, "index", index);
  check_device(op, "x", x, "weight", weight);
  check_dim(op, "x", x, 2, "[T, d]");
  check_dim(op, "index", index, 2, "[T, k]");
  TENFOLD_CHECK_RUNTIME(same_sizes(index, weight), "tenfold::", op,
                        ": weight must have the shape of index ", shape_str(index), ", got ",
                        shape_str(weight));
  TENFOLD_CHECK_RUNTIME(index.sizes()[0] == x.sizes()[0], "tenfold::", op,
                        ": index must be [T, k] with T = ", x.sizes()[0], " of x ", shape_str(x),
                        ", got ", shape_str(index));
  TENFOLD_CHECK_VALUE(index.numel() < kMostSlots, "tenfold::", op,
                      ": fewer than 2^31 slots are supported, got index ", shape_str(index));
  return {with_contiguous_rows(x),
          as_contiguous(index),
          as_contiguous(weight),
          x.sizes()[0],
          x.sizes()[1],
          index.sizes()[1],
          0,
          0};
}

}  // namespace

GroupedCall check_grouped_gemm(const Tensor& a, const Tensor& w, const Tensor& offsets,
                               bool trans_w, const OptTensor& gather) {
  constexpr auto op = "grouped_gemm";
  check_float_dtype(op, "a", a);
  check_like(op, "a", a, "w", w);
  check_dim(op, "a", a, 2, "[R, K]");
  check_dim(op, "w", w, 3, trans_w ? "[n, N, K]" : "[n, K, N]");
  GroupedCall c{};
  c.a = with_contiguous_rows(a), c.w = with_contiguous_rows(w);
  check_groups(op, &c, "a", offsets, gather);
  c.depth = a.sizes()[1], c.cols = w.sizes()[trans_w ? 1 : 2];
  TENFOLD_CHECK_VALUE(w.sizes()[trans_w ? 2 : 1] == c.depth, "tenfold::", op, ": w must be ",
                      trans_w ? "[n, N, K]" : "[n, K, N]", " with K = ", c.depth, " of a ",
                      shape_str(a), ", got ", shape_str(w));
  TENFOLD_CHECK_VALUE(w.sizes()[0] == c.groups, "tenfold::", op, ": offsets must be [",
                      w.sizes()[0] + 1, "], one more than matrices in w, got ", shape_str(offsets));
  return c;
}

GroupedCall check_grouped_gemm_wgrad(const Tensor& dy, const Tensor& a, const Tensor& offsets,
                                     const OptTensor& gather) {
  constexpr auto op = "grouped_gemm_wgrad";
  check_float_dtype(op, "dy", dy);
  check_like(op, "dy", dy, "a", a);
  check_dim(op, "dy", dy, 2, "[S, N]");
  check_dim(op, "a", a, 2, "[R, K]");
  GroupedCall c{};
  c.a = with_contiguous_rows(a), c.w = with_contiguous_rows(dy);
  check_groups(op, &c, "a", offsets, gather);
  c.depth = a.sizes()[1], c.cols = dy.sizes()[1];
  TENFOLD_CHECK_VALUE(dy.sizes()[0] == c.slots, "tenfold::", op,
                      ": dy must be [S, N] with S = ", c.slots,
                      gather ? " of gather, got " : " rows of a, got ", shape_str(dy));
  return c;
}

ExpertsCall check_experts(const char* op, const Tensor& x, const Tensor& gate_up,
                          const Tensor& down, const Tensor& index, const Tensor& weight) {
  check_float_dtype(op, "x", x);
  check_like(op, "x", x, "gate_up", gate_up);
  check_like(op, "x", x, "down", down);
  ExpertsCall c{check_routing(op, x, index, weight), with_contiguous_rows(gate_up),
                with_contiguous_rows(down)};
  check_dim(op, "gate_up", gate_up, 3, "[n, 2 f, d]");
  c.experts = gate_up.sizes()[0], c.ffn = gate_up.sizes()[1] / 2;
  TENFOLD_CHECK_VALUE(c.experts > 0 && gate_up.sizes()[1] % 2 == 0 && gate_up.sizes()[2] == c.dim,
                      "tenfold::", op, ": gate_up must be [n, 2 f, d] with n > 0 and d = ", c.dim,
                      " of x ", shape_str(x), ", got ", shape_str(gate_up));
  check_sizes(op, "down", down, {c.experts, c.dim, c.ffn}, "[n, d, f] of gate_up");
  return c;
}

LoraCall check_lora_experts(const char* op, const Tensor& x, const std::array<Tensor, 3>& base,
                            const std::array<Tensor, 3>& a, const std::array<Tensor, 3>& b,
                            double scale, const Tensor& index, const Tensor& weight) {
  static constexpr const char* kBase[] = {"wg", "wu", "wd"};
  static constexpr const char* kA[] = {"lora_a[0]", "lora_a[1]", "lora_a[2]"};
  static constexpr const char* kB[] = {"lora_b[0]", "lora_b[1]", "lora_b[2]"};
  check_float_dtype(op, "x", x);
  LoraCall c{check_routing(op, x, index, weight), base, a, b, 0, static_cast<float>(scale)};
  TENFOLD_CHECK_VALUE(std::isfinite(scale), "tenfold::", op, ": scale must be finite, got ", scale);
  for (int i = 0; i < 3; ++i) {
    check_like(op, "x", x, kBase[i], base[i]);
    check_like(op, "x", x, kA[i], a[i]);
    check_like(op, "x", x, kB[i], b[i]);
  }
  check_dim(op, "wg", base[kGate], 2, "[f, d]");
  check_dim(op, kA[0], a[kGate], 3, "[n, r, d]");
  c.ffn = base[kGate].sizes()[0];
  c.experts = a[kGate].sizes()[0], c.rank = a[kGate].sizes()[1];
  TENFOLD_CHECK_VALUE(c.experts > 0, "tenfold::", op, ": ", kA[0],
                      " must be [n, r, d] with n > 0, got ", shape_str(a[kGate]));
  for (int i = 0; i < 3; ++i) {
    const int64_t in = i == kDown ? c.ffn : c.dim, out = i == kDown ? c.dim : c.ffn;
    check_sizes(op, kBase[i], base[i], {out, in}, i == kDown ? "[d, f]" : "[f, d]");
    check_sizes(op, kA[i], a[i], {c.experts, c.rank, in}, i == kDown ? "[n, r, f]" : "[n, r, d]");
    check_sizes(op, kB[i], b[i], {c.experts, out, c.rank}, i == kDown ? "[n, d, r]" : "[n, f, r]");
    c.base[i] = with_contiguous_rows(base[i]);
    c.a[i] = with_contiguous_rows(a[i]);
    c.b[i] = with_contiguous_rows(b[i]);
  }
  return c;
}

Tensor wanted_like(const Tensor& t, bool wanted, std::initializer_list<int64_t> sizes) {
  return new_output(t, wanted ? sizes : std::initializer_list<int64_t>{0}, t.scalar_type());
}

LoraBackward check_lora_backward(const char* op, const LoraCall& c, const Tensor& grad_out,
                                 const Tensor& hidden, const Tensor& low, int64_t wanted) {
  const int64_t s = c.tokens * c.k, f = c.ffn, r = c.rank, n = c.experts, d = c.dim;
  const auto like = [&](int bit, const Tensor& t, std::initializer_list<int64_t> sizes) {
    return wanted_like(t, wanted >> bit & 1, sizes);
  };
  return {check_rows_like(op, "grad_out", grad_out, c, c.tokens, d, "[T, d]"),
          as_contiguous(check_rows_like(op, "hidden", hidden, c, s, 2 * f, "[S, 2 f]")),
          as_contiguous(check_rows_like(op, "low", low, c, s, 2 * r, "[S, 2 r]")),
          {like(0, c.x, {c.tokens, d}), like(1, c.x, {f, d}), like(2, c.x, {f, d}),
           like(3, c.x, {d, f}), like(4, c.x, {n, r, d}), like(5, c.x, {n, r, d}),
           like(6, c.x, {n, r, f}), like(7, c.x, {n, f, r}), like(8, c.x, {n, f, r}),
           like(9, c.x, {n, d, r}), like(10, c.weight, {c.tokens, c.k})},
          wanted};
}

void check_three(const char* name, const std::vector<Tensor>& tensors) {
  TENFOLD_CHECK_VALUE(tensors.size() == 3, "tenfold::moe_lora_swiglu_mlp: ", name,
                      " must be 3 tensors, of gate, up and down, got ", tensors.size());
}

Tensor check_rows_like(const char* op, const char* arg, const Tensor& t, const RoutedCall& c,
                       int64_t rows, int64_t cols, const char* layout) {
  check_like(op, "x", c.x, arg, t);
  check_sizes(op, arg, t, {rows, cols}, layout);
  return with_contiguous_rows(t);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "grouped_gemm(Tensor a, Tensor w, Tensor offsets, bool trans_w=True, Tensor? gather=None) "
      "-> Tensor");
  m.def("grouped_gemm_wgrad(Tensor dy, Tensor a, Tensor offsets, Tensor? gather=None) -> Tensor");
  m.def(
      "moe_swiglu_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight, *, "
      "bool allow_sentinel=False) -> Tensor");
  // With the pre-activations of sorted slots, [S, 2 f], for the gradients. Rows of slots without an
  // expert are not written.
  m.def(
      "moe_swiglu_mlp_train(Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight, *, "
      "bool allow_sentinel=False) -> (Tensor out, Tensor hidden)");
  // Gradients that are not wanted are empty.
  m.def(
      "moe_swiglu_mlp_backward(Tensor grad_out, Tensor x, Tensor gate_up, Tensor down, "
      "Tensor index, Tensor weight, Tensor hidden, bool of_x, bool of_gate_up, bool of_down, "
      "bool of_weight, *, bool allow_sentinel=False) "
      "-> (Tensor grad_x, Tensor grad_gate_up, Tensor grad_down, Tensor grad_weight)");
  m.def(
      "moe_lora_swiglu_mlp(Tensor x, Tensor wg, Tensor wu, Tensor wd, Tensor[] lora_a, "
      "Tensor[] lora_b, float scale, Tensor index, Tensor weight, *, bool allow_sentinel=False) "
      "-> Tensor");
  // The same without lists, which autograd and checks of one tensor each can do without.
  m.def(
      "moe_lora_experts(Tensor x, Tensor wg, Tensor wu, Tensor wd, Tensor a_gate, Tensor a_up, "
      "Tensor a_down, Tensor b_gate, Tensor b_up, Tensor b_down, float scale, Tensor index, "
      "Tensor weight, *, bool allow_sentinel=False) -> Tensor");
  // hidden [S, 2 f] as above; low [S, 2 r]: scale times x A^T of gate and up.
  m.def(
      "moe_lora_experts_train(Tensor x, Tensor wg, Tensor wu, Tensor wd, Tensor a_gate, "
      "Tensor a_up, Tensor a_down, Tensor b_gate, Tensor b_up, Tensor b_down, float scale, "
      "Tensor index, Tensor weight, *, bool allow_sentinel=False) "
      "-> (Tensor out, Tensor hidden, Tensor low)");
  // `wanted`: bit i for gradient i of the results.
  m.def(
      "moe_lora_experts_backward(Tensor grad_out, Tensor x, Tensor wg, Tensor wu, Tensor wd, "
      "Tensor a_gate, Tensor a_up, Tensor a_down, Tensor b_gate, Tensor b_up, Tensor b_down, "
      "float scale, Tensor index, Tensor weight, Tensor hidden, Tensor low, int wanted, *, "
      "bool allow_sentinel=False) -> (Tensor grad_x, Tensor grad_wg, Tensor grad_wu, "
      "Tensor grad_wd, Tensor grad_a_gate, Tensor grad_a_up, Tensor grad_a_down, "
      "Tensor grad_b_gate, Tensor grad_b_up, Tensor grad_b_down, Tensor grad_weight)");
}
