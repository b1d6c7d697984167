// SPDX-License-Identifier: Apache-2.0
// CPU registration of moe_gate, moe_gate_linear and their backward: tiles of tokens over threads.
#include "moe/gate.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "core/scratch.h"
#include "moe/cpu/slot_sort.h"
#include "moe/gate_linear.h"
#include "moe/gate_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerLogit = 0.0004, kMicrosPerChoice = 0.0006;
constexpr double kMicrosPerEntry = 0.0001;     // of the choice of many, per logit and k
constexpr double kMicrosPerProduct = 0.00003;  // of one thread's multiply-adds

double gate_micros(int64_t experts, int64_t k) {
  if (k > 16) return kMicrosPerEntry * static_cast<double>(experts * (k + 2));
  return kMicrosPerLogit * static_cast<double>(experts) + kMicrosPerChoice * static_cast<double>(k);
}

// f(begin, end, scratch) over whole tiles of tokens.
template <class F>
void over_tiles(int64_t tokens, int64_t experts, int64_t k, const F& f) {
  const int64_t tiles = (tokens + kGateTokens - 1) / kGateTokens;
  parallel_for(tiles, gate_micros(experts, k) * kGateTokens, [&](int64_t begin, int64_t end) {
    const Scratch scratch(gate_scratch(experts, k) * 4);
    f(begin * kGateTokens, std::min(end * kGateTokens, tokens),
      static_cast<float*>(scratch.data()));
  });
}

std::tuple<Tensor, Tensor> moe_gate_op(Tensor logits, int64_t k, bool renormalize) {
  const GateCall c = check_gate("moe_gate", logits, k, renormalize);
  const GateParams p = c.params();
  over_tiles(c.tokens, c.experts, k, [&](int64_t begin, int64_t end, float* scratch) {
    TENFOLD_ISA_CALL(gate_rows, p, begin, end, scratch);
  });
  return {c.weight, c.index};
}

// Gate and sort by one pass of threads: slots are counted by who has chosen them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route_op(Tensor logits, int64_t k,
                                                                        bool renormalize) {
  const GateCall c = check_gate("moe_route", logits, k, renormalize);
  const SortCall s = check_sort(c.index, c.experts, false);
  const GateParams p = c.params();
  const double micros = gate_micros(c.experts, k) + kMicrosPerSlot * static_cast<double>(k);
  const double tasks = micros * static_cast<double>(c.tokens) / kMinTaskMicros;
  // Of a chunk: as many as a task is worth, and not more slots than a chunk of the sort has.
  const int64_t worth =
      static_cast<int64_t>(static_cast<double>(c.tokens) / std::max(1.0, std::ceil(tasks)));
  const int64_t tokens = ceil_div(std::min(worth, kSortChunk / k) + 1, kGateTokens) * kGateTokens;
  SlotSort<int32_t>(s, tokens * k).run_after(micros * tokens, [&](int64_t chunk) {
    const Scratch scratch(gate_scratch(c.experts, k) * 4);
    TENFOLD_ISA_CALL(gate_rows, p, chunk * tokens, std::min((chunk + 1) * tokens, c.tokens),
                     static_cast<float*>(scratch.data()));
  });
  return {c.weight, c.index, s.order, s.inverse, s.counts, s.offsets};
}

void run_gate_grad(const GateGradCall& c) {
  const GateGradParams p = c.params();
  over_tiles(c.logits.sizes()[0], p.experts, p.k, [&](int64_t begin, int64_t end, float* scratch) {
    TENFOLD_ISA_CALL(gate_grad_rows, p, begin, end, scratch);
  });
}

Tensor moe_gate_backward_op(Tensor grad_weight, Tensor logits, Tensor weight, Tensor index,
                            bool renormalize) {
  const GateGradCall c = check_gate_grad("moe_gate_backward", grad_weight, logits, weight, index,
                                         renormalize, std::nullopt);
  run_gate_grad(c);
  return c.out;
}

std::tuple<Tensor, Tensor, Tensor> moe_gate_linear_op(Tensor x, Tensor w_router, int64_t k,
                                                      bool renormalize) {
  constexpr auto kOp = "moe_gate_linear";
  const RouterCall r = check_router(kOp, x, w_router);
  check_k(kOp, k, r.experts);
  const Tensor logits = new_output(r.x, {r.tokens, r.experts}, ScalarType::Float);
  const GateCall c = check_gate(kOp, logits, k, renormalize);
  const GateParams gate = c.params();
  const RouterParams router = r.params(data_as<float>(logits));
  const int64_t tiles = (r.tokens + kRouterTokens - 1) / kRouterTokens;
  const double micros =
      kMicrosPerProduct * static_cast<double>(r.experts * r.dim) + gate_micros(r.experts, k);
  parallel_for(tiles, micros * kRouterTokens, [&](int64_t begin, int64_t end) {
    const Scratch scratch(gate_scratch(r.experts, k) * 4);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i * kRouterTokens, last = std::min(t + kRouterTokens, r.tokens);
      TENFOLD_ISA_CALL(router_logits, router, t, last);
      TENFOLD_ISA_CALL(gate_rows, gate, t, last, static_cast<float*>(scratch.data()));
    }
  });
  return {logits, c.weight, c.index};
}

// out = a b in blocks: rows [row, row + rows) by kOuterCols columns are a task's, in float32, and
// rounded where `out` is not.
class Outer {
 public:
  Outer(OuterParams p, int64_t cols, const Tensor& out)
      : p_(p), cols_(cols), dtype_(to_dtype(out.scalar_type())), out_(out) {}

  void run(int64_t rows_of_task) const {
    const int64_t down = (p_.rows + rows_of_task - 1) / rows_of_task;
    const int64_t across = (cols_ + kOuterCols - 1) / kOuterCols;
    const double micros =
        kMicrosPerProduct * static_cast<double>(rows_of_task * kOuterCols * p_.depth);
    parallel_for(down * across, micros, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / across * rows_of_task, col = i % across * kOuterCols;
        block(row, std::min(rows_of_task, p_.rows - row), col, std::min(kOuterCols, cols_ - col));
      }
    });
  }

 private:
  void block(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    OuterParams p = p_;
    p.a += row * p.a_row;
    p.rows = rows;
    const int64_t size = dtype_size(dtype_);
    auto* const out = static_cast<char*>(out_.data_ptr()) + (row * cols_ + col) * size;
    if (dtype_ == Dtype::f32) {
      p.out = reinterpret_cast<float*>(out);
      p.pitch = cols_;
      return TENFOLD_ISA_CALL(router_outer, p, col, cols);
    }
    const Scratch scratch(rows * kOuterCols * 4);
    auto* const sums = static_cast<float*>(scratch.data());
    p.out = sums;
    p.pitch = kOuterCols;
    TENFOLD_ISA_CALL(router_outer, p, col, cols);
    for (int64_t r = 0; r < rows; ++r)
      TENFOLD_ISA_CALL(router_round, sums + r * kOuterCols, cols, dtype_, out + r * cols_ * size);
  }

  OuterParams p_;
  int64_t cols_;
  Dtype dtype_;
  Tensor out_;
};

std::tuple<Tensor, Tensor> moe_gate_linear_backward_op(OptTensor grad_logits, OptTensor grad_weight,
                                                       Tensor x, Tensor w_router, Tensor logits,
                                                       Tensor weight, Tensor index,
                                                       bool renormalize, bool of_x, bool of_w) {
  constexpr auto kOp = "moe_gate_linear_backward";
  const RouterCall r = check_router(kOp, x, w_router);
  const RouterGradCall c =
      check_router_grad(kOp, r, grad_logits, grad_weight, logits, weight, index, renormalize);
  if (c.gate) run_gate_grad(*c.gate);
  const auto dtype = [](const Tensor& t) { return to_dtype(t.scalar_type()); };
  const RouterParams p = r.params(nullptr);
  const Tensor grad_x = of_x ? new_output(x, {r.tokens, r.dim}, x.scalar_type())
                             : new_output(x, {0}, x.scalar_type());
  const Tensor grad_w = of_w ? new_output(x, {r.experts, r.dim}, w_router.scalar_type())
                             : new_output(x, {0}, w_router.scalar_type());
  const auto* const a = data_as<float>(c.grad);
  if (of_x)
    Outer({a, r.experts, 1, r.tokens, r.experts, p.w, dtype(r.w), p.w_stride, nullptr, 0}, r.dim,
          grad_x)
        .run(kRouterTokens);
  if (of_w) {
    if (r.tokens == 0) {
      Tensor none = grad_w;
      torch::stable::zero_(none);
    } else {
      Outer({a, 1, r.experts, r.experts, r.tokens, p.x, dtype(r.x), p.x_stride, nullptr, 0}, r.dim,
            grad_w)
          .run(r.experts);
    }
  }
  return {grad_x, grad_w};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("moe_gate", TORCH_BOX(&tenfold::cpu::moe_gate_op));
  m.impl("moe_route", TORCH_BOX(&tenfold::cpu::moe_route_op));
  m.impl("moe_gate_backward", TORCH_BOX(&tenfold::cpu::moe_gate_backward_op));
  m.impl("moe_gate_linear", TORCH_BOX(&tenfold::cpu::moe_gate_linear_op));
  m.impl("moe_gate_linear_backward", TORCH_BOX(&tenfold::cpu::moe_gate_linear_backward_op));
}
