// SPDX-License-Identifier: Apache-2.0
#include "moe/cpu/lora_experts.h"

#include <algorithm>

#include "core/parallel.h"

namespace tenfold::cpu {

LoraExperts::LoraExperts(const char* op, const LoraCall& c, bool allow_sentinel)
    : c_(c),
      isa_(active_isa()),
      dtype_(to_dtype(c.x.scalar_type())),
      slots_(sorted_slots(op, c, allow_sentinel)),
      weights_(sorted_weights(c, slots_)),
      groups_(groups_of(slots_)),
      all_{0, c.tokens} {}

char* LoraExperts::at(const void* rows, int64_t col) const {
  return const_cast<char*>(static_cast<const char*>(rows)) + col * dtype_size(dtype_);
}

// Half i of rows of 2 `cols`.
MoeRows LoraExperts::part(const void* rows, int64_t i, int64_t cols) const {
  return {at(rows, i * cols), 2 * cols};
}

GroupedProduct LoraExperts::single(const MoeRows& a, int64_t depth, int64_t cols,
                                   const Matrices& w) const {
  return {dtype_, depth, cols, 1, {a, {}}, {w, {}}};
}

GroupedProduct LoraExperts::pair(const MoeRows& one, const MoeRows& other, int64_t depth,
                                 int64_t cols, const Matrices& w_one,
                                 const Matrices& w_other) const {
  return {dtype_, depth, cols, 2, {one, other}, {w_one, w_other}};
}

// w a of all slots, and pre-activations unless `hidden` is null.
void LoraExperts::activate(void* hidden, const void* low, void* wa) const {
  const int64_t f = c_.ffn, r = c_.rank, width = round_cols(2 * c_.tokens, f);
  const MoeRows x = rows_of(c_.x);
  const GroupedProduct base =
      pair(x, x, c_.dim, f, matrices_of(c_.base[kGate], true), matrices_of(c_.base[kUp], true));
  const GroupedProduct own = pair(part(low, 0, r), part(low, 1, r), r, f,
                                  matrices_of(c_.b[kGate], true), matrices_of(c_.b[kUp], true));
  const Floats memory{2 * c_.tokens * width};
  for (int64_t first = 0; first < f; first += width) {
    const int64_t cols = std::min(width, f - first);
    grouped_product(isa_, base, tokens(), first, cols, [&](const ProductTile& t) {
      for (int64_t i = 0; i < 2; ++i)
        TENFOLD_ISA_CALL_AS(isa_, moe_store, t.rows,
                            {t.sums[i], 1.0f, nullptr, Dtype::f32,
                             memory[0] + i * width + t.col - first, 2 * width});
    });
    grouped_product(isa_, own, groups_, first, cols, [&](const ProductTile& t) {
      const MoeBase gate{memory[0] + t.col - first, 2 * width, slots_.row.data()};
      const MoeBase up{gate.data + width, gate.stride, gate.gather};
      MoeSwiglu s{t.sums[0], t.sums[1], gate,    up,   weights_.data(), dtype_, at(wa, t.col),
                  f,         nullptr,   nullptr, 2 * f};
      if (hidden != nullptr) s.g = at(hidden, t.col), s.u = at(hidden, f + t.col);
      TENFOLD_ISA_CALL_AS(isa_, moe_swiglu, t.rows, s);
    });
  }
}

// scale w a A_d^T
void LoraExperts::down_low(const void* wa, void* low) const {
  const GroupedProduct p = single({wa, c_.ffn}, c_.ffn, c_.rank, matrices_of(c_.a[kDown], true));
  grouped_product(isa_, p, groups_, store_as(isa_, dtype_, p, c_.scale, low, c_.rank));
}

void LoraExperts::forward(void* hidden, void* low, void* out) const {
  const int64_t f = c_.ffn, r = c_.rank;
  const Floats memory{floats_for(num_slots() * f, dtype_), floats_for(num_slots() * r, dtype_),
                      floats_for(c_.tokens * f, dtype_)};
  void *const wa = memory[0], *const of_down = memory[1], *const summed = memory[2];
  const MoeRows x = rows_of(c_.x, &slots_);
  const GroupedProduct first =
      pair(x, x, c_.dim, r, matrices_of(c_.a[kGate], true), matrices_of(c_.a[kUp], true));
  grouped_product(isa_, first, groups_, store_as(isa_, dtype_, first, c_.scale, low, 2 * r));
  activate(hidden, low, wa);
  down_low(wa, of_down);
  slots_to_tokens(isa_, dtype_, slots_, c_.tokens, c_.k, wa, f, summed);
  const GroupedProduct base = single({summed, f}, f, c_.dim, matrices_of(c_.base[kDown], true));
  product_to_tokens(isa_, single({of_down, r}, r, c_.dim, matrices_of(c_.b[kDown], true)), slots_,
                    c_.tokens, c_.k, nullptr, &base, out);
}

// both: [dg, du]; up: scale G B_d. The gradient of weight is 0 before.
void LoraExperts::activate_backward(const Tensor& grad, const void* hidden, const void* up,
                                    void* both, void* wa, float* weight) const {
  const int64_t f = c_.ffn, r = c_.rank, s = num_slots(), width = round_cols(c_.tokens, f);
  const GroupedProduct base = single(rows_of(grad), c_.dim, f, matrices_of(c_.base[kDown], false));
  const GroupedProduct own = single({up, r}, r, f, matrices_of(c_.a[kDown], false));
  int64_t most_blocks = 0;
  for (int64_t first = 0; first < f; first += width)
    most_blocks = std::max(most_blocks, product_blocks(own, groups_, std::min(width, f - first)));
  const Floats memory{c_.tokens * width, most_blocks * s};
  for (int64_t first = 0; first < f; first += width) {
    const int64_t cols = std::min(width, f - first);
    grouped_product(isa_, base, tokens(), first, cols, [&](const ProductTile& t) {
      TENFOLD_ISA_CALL_AS(isa_, moe_store, t.rows,
                          {t.sums[0], 1.0f, nullptr, Dtype::f32, memory[0] + t.col - first, width});
    });
    grouped_product(isa_, own, groups_, first, cols, [&](const ProductTile& t) {
      MoeSwigluBackward b{};
      b.sums = t.sums[0];
      b.base = {memory[0] + t.col - first, width, slots_.row.data()};
      b.factor = weights_.data();
      b.dtype = dtype_;
      b.g = at(hidden, t.col), b.u = at(hidden, f + t.col);
      b.dg = at(both, t.col), b.du = at(both, f + t.col);
      b.g_stride = 2 * f;
      b.wa = at(wa, t.col), b.wa_stride = f;
      b.dot = memory[1] + t.block * s;
      TENFOLD_ISA_CALL_AS(isa_, moe_swiglu_backward, t.rows, b);
    });
    if (weight != nullptr)
      add_weight_gradient(slots_, memory[1], product_blocks(own, groups_, cols), weight);
  }
}

// Of the frozen block, which rarely trains. `hidden`: the sum of [dg, du] over a token's slots.
void LoraExperts::base_gradients(const Tensor& grad, const void* wa, const void* hidden,
                                 const Gradients& out) const {
  const int64_t f = c_.ffn;
  for (int64_t i = 0; i < 2; ++i)
    if (out.base[i] != nullptr)
      grouped_wgrad(isa_, dtype_, part(hidden, i, f), f, rows_of(c_.x), c_.dim, tokens(),
                    out.base[i]);
  if (out.base[kDown] == nullptr) return;
  const Floats summed{floats_for(c_.tokens * f, dtype_)};
  slots_to_tokens(isa_, dtype_, slots_, c_.tokens, c_.k, wa, f, summed[0]);
  grouped_wgrad(isa_, dtype_, rows_of(grad), c_.dim, {summed[0], f}, f, tokens(), out.base[kDown]);
}

void LoraExperts::backward(const Tensor& grad, const Tensor& hidden, const Tensor& low,
                           const Gradients& out) const {
  const int64_t f = c_.ffn, r = c_.rank, d = c_.dim, s = num_slots();
  const Floats memory{floats_for(s * r, dtype_), floats_for(s * 2 * f, dtype_),
                      floats_for(s * f, dtype_), floats_for(s * 2 * r, dtype_),
                      floats_for(c_.tokens * 2 * f, dtype_)};
  void *const up = memory[0], *const both = memory[1], *const wa = memory[2];
  void *const dlow = memory[3], *const summed = memory[4];
  const MoeRows g = rows_of(grad, &slots_), x = rows_of(c_.x, &slots_);
  const GroupedProduct first = single(g, d, r, matrices_of(c_.b[kDown], false));
  grouped_product(isa_, first, groups_, store_as(isa_, dtype_, first, c_.scale, up, r));
  activate_backward(grad, hidden.data_ptr(), up, both, wa, out.weight);
  const auto wgrad = [&](const MoeRows& dy, int64_t rows, const MoeRows& a, int64_t cols,
                         void* to) {
    if (to != nullptr) grouped_wgrad(isa_, dtype_, dy, rows, a, cols, groups_, to);
  };
  wgrad({up, r}, r, {wa, f}, f, out.a[kDown]);
  for (int i = 0; i < 2; ++i) wgrad(part(both, i, f), f, part(low.data_ptr(), i, r), r, out.b[i]);
  const GroupedProduct back = pair(part(both, 0, f), part(both, 1, f), f, r,
                                   matrices_of(c_.b[kGate], false), matrices_of(c_.b[kUp], false));
  grouped_product(isa_, back, groups_, store_as(isa_, dtype_, back, c_.scale, dlow, 2 * r));
  for (int i = 0; i < 2; ++i) wgrad(part(dlow, i, r), r, x, d, out.a[i]);
  slots_to_tokens(isa_, dtype_, slots_, c_.tokens, c_.k, both, 2 * f, summed);
  base_gradients(grad, wa, summed, out);
  if (out.x != nullptr) {
    GroupedProduct own = pair(part(dlow, 0, r), part(dlow, 1, r), r, d,
                              matrices_of(c_.a[kGate], false), matrices_of(c_.a[kUp], false));
    GroupedProduct base =
        pair(part(summed, 0, f), part(summed, 1, f), f, d, matrices_of(c_.base[kGate], false),
             matrices_of(c_.base[kUp], false));
    own.together = base.together = true;
    product_to_tokens(isa_, own, slots_, c_.tokens, c_.k, nullptr, &base, out.x);
  }
  if (out.b[kDown] == nullptr) return;
  down_low(wa, up);  // what was there is no longer needed
  wgrad(g, d, {up, r}, r, out.b[kDown]);
}

}  // namespace tenfold::cpu
