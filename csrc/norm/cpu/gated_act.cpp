// SPDX-License-Identifier: Apache-2.0
// CPU registration of swiglu and gated_gelu: spans of rows are shared out among threads.
#include <torch/csrc/stable/library.h>

#include "core/cpu/past_caches.h"
#include "core/parallel.h"
#include "norm/gated_act_ops.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kSpan = 8192;  // elements of a task
constexpr double kMicrosPerElement = 5e-4;

// f(row, first column, how many columns) for spans that cover all rows.
template <class F>
void for_spans(RowShape shape, double micros, const F& f) {
  const int64_t per_row = ceil_div(shape.cols, kSpan);
  const double size = static_cast<double>(std::min(kSpan, shape.cols));
  parallel_for(shape.rows * per_row, micros * size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {  // neighbours as one
      const int64_t row = i / per_row, col = i % per_row * kSpan;
      const int64_t n = std::min((end - i) * kSpan, shape.cols - col);
      f(row, col, n);
      i += ceil_div(n, kSpan);
    }
  });
}

const char* at(const Rows& r, int64_t row, int64_t col, int64_t size) {
  return static_cast<const char*>(r.data) + (row * r.stride + col) * size;
}

void run_forward(const GatedCall& c) {
  const int64_t size = dtype_size(c.dtype);
  const bool past = past_caches(c.shape.rows * c.shape.cols * size, c.fresh) && !c.in_place;
  const RowShape shape = joined_rows(c.shape, {c.a.stride, c.b.stride, c.out.stride});
  for_spans(shape, kMicrosPerElement, [&](int64_t row, int64_t col, int64_t n) {
    const GatedSpan span{c.dtype,
                         c.gate,
                         past,
                         at(c.a, row, col, size),
                         at(c.b, row, col, size),
                         const_cast<char*>(at(c.out, row, col, size)),
                         n};
    TENFOLD_ISA_CALL(gated_act, span);
  });
}

Tensor gated_act_op(Tensor a, Tensor b, int64_t act) {
  constexpr auto kOp = "gated_act";
  const GatedCall c = check_gated(kOp, "a", "b", gate_of(kOp, act), nullptr, a, b);
  run_forward(c);
  return c.out.t;
}

void gated_act_out_op(Tensor out, Tensor a, Tensor b, int64_t act) {
  constexpr auto kOp = "gated_act_";
  run_forward(check_gated(kOp, "a", "b", gate_of(kOp, act), &out, a, b));
}

Tensor swiglu_op(Tensor gate, Tensor up) {
  const GatedCall c = check_gated("swiglu", "gate", "up", Gate::silu, nullptr, gate, up);
  run_forward(c);
  return c.out.t;
}

void swiglu_out_op(Tensor out, Tensor gate, Tensor up) {
  run_forward(check_gated("swiglu_", "gate", "up", Gate::silu, &out, gate, up));
}

Tensor gated_gelu_op(Tensor a, Tensor b, std::string approximate) {
  constexpr auto kOp = "gated_gelu";
  const GatedCall c = check_gated(kOp, "a", "b", gelu_of(kOp, approximate), nullptr, a, b);
  run_forward(c);
  return c.out.t;
}

void gated_gelu_out_op(Tensor out, Tensor a, Tensor b, std::string approximate) {
  constexpr auto kOp = "gated_gelu_";
  run_forward(check_gated(kOp, "a", "b", gelu_of(kOp, approximate), &out, a, b));
}

std::tuple<Tensor, Tensor> gated_act_backward_op(Tensor grad, Tensor a, Tensor b, int64_t act,
                                                 bool of_a, bool of_b) {
  const GatedGradCall c = check_gated_backward(grad, a, b, act, of_a, of_b);
  if (!of_a && !of_b) return {c.da, c.db};
  const int64_t size = dtype_size(c.dtype), cols = c.shape.cols;
  const RowShape shape = joined_rows(c.shape, {c.dout.stride, c.a.stride, c.b.stride});
  const bool past = past_caches(c.shape.rows * cols * size, true);
  auto *const da = of_a ? data_as<char>(c.da) : nullptr, *const db =
                                                             of_b ? data_as<char>(c.db) : nullptr;
  for_spans(shape, 2 * kMicrosPerElement, [&](int64_t row, int64_t col, int64_t n) {
    const int64_t to = (row * shape.cols + col) * size;
    const GatedGradSpan span{c.dtype,
                             c.gate,
                             past,
                             at(c.dout, row, col, size),
                             at(c.a, row, col, size),
                             at(c.b, row, col, size),
                             of_a ? da + to : nullptr,
                             of_b ? db + to : nullptr,
                             n};
    TENFOLD_ISA_CALL(gated_act_grad, span);
  });
  return {c.da, c.db};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("gated_act", TORCH_BOX(&tenfold::cpu::gated_act_op));
  m.impl("gated_act_", TORCH_BOX(&tenfold::cpu::gated_act_out_op));
  m.impl("swiglu", TORCH_BOX(&tenfold::cpu::swiglu_op));
  m.impl("swiglu_", TORCH_BOX(&tenfold::cpu::swiglu_out_op));
  m.impl("gated_gelu", TORCH_BOX(&tenfold::cpu::gated_gelu_op));
  m.impl("gated_gelu_", TORCH_BOX(&tenfold::cpu::gated_gelu_out_op));
  m.impl("gated_act_backward", TORCH_BOX(&tenfold::cpu::gated_act_backward_op));
}
