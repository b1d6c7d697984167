// SPDX-License-Identifier: Apache-2.0
// CPU registration of weighted_linear_ce: linear_cross_entropy's kernel, with another view of what
// it gives.
#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "loss/cpu/linear_rows.h"

namespace tenfold::cpu {
namespace {

struct Results {
  Tensor loss_sum, w_sum, nll;
};

Tensor number(const LinearLossCall& c, double x) {
  const Tensor out = new_output(c.hidden, {}, ScalarType::Float);
  *data_as<float>(out) = static_cast<float>(x);
  return out;
}

Results results(const LinearLossCall& c, const CountedRows& rows, const RowSums& sums) {
  std::vector<float> nll(rows.row.size());
  double loss = 0.0, weight = 0.0;
  for (size_t i = 0; i < nll.size(); ++i) {
    nll[i] = -sums.logp[i];
    const double w = rows.weight[i];
    loss += w * nll[i], weight += w;
  }
  return {number(c, loss), number(c, weight), spread(c, rows, nll)};
}

struct Call {
  LinearLossCall c;
  CountedRows rows;
  RowSums sums;

  Call(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
       const Tensor& w, int64_t chunk, int64_t ignore_index)
      : c(check_weighted_loss(op, hidden, weight, targets, w, chunk, ignore_index)),
        rows(counted_rows(op, c, "targets")),
        sums(room_for_sums(rows, false)) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor> weighted_linear_ce_forward_op(
    Tensor hidden, Tensor weight, Tensor targets, Tensor w, int64_t chunk, int64_t ignore_index) {
  Call call("weighted_linear_ce_forward", hidden, weight, targets, w, chunk, ignore_index);
  LinearLoss(call.c, call.rows, false).forward(&call.sums);
  const Results r = results(call.c, call.rows, call.sums);
  return {r.loss_sum, r.w_sum, r.nll, spread(call.c, call.rows, call.sums.lse)};
}

std::tuple<Tensor, Tensor, Tensor> weighted_linear_ce_op(Tensor hidden, Tensor weight,
                                                         Tensor targets, Tensor w, int64_t chunk,
                                                         int64_t ignore_index,
                                                         std::string grad_of) {
  constexpr auto kOp = "weighted_linear_ce";
  check_grad_of(kOp, grad_of);
  Call call(kOp, hidden, weight, targets, w, chunk, ignore_index);
  LinearLoss(call.c, call.rows, false).forward(&call.sums);
  const Results r = results(call.c, call.rows, call.sums);
  return {r.loss_sum, r.w_sum, r.nll};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weighted_linear_ce_grads_op(
    Tensor hidden, Tensor weight, Tensor targets, Tensor w, bool of_hidden, bool of_weight,
    int64_t chunk, int64_t ignore_index) {
  Call call("weighted_linear_ce_grads", hidden, weight, targets, w, chunk, ignore_index);
  const Gradients g = room_for_gradients(call.c, of_hidden, of_weight);
  LinearLoss(call.c, call.rows, false)
      .forward_gradients(
          &call.sums,
          [&](int64_t i) { return loss_slopes(call.rows.weight[i], 0.0f, call.sums.lse[i], 0.0f); },
          g.out);
  const Results r = results(call.c, call.rows, call.sums);
  return {r.loss_sum, r.w_sum, r.nll, spread(call.c, call.rows, call.sums.lse), g.hidden, g.weight};
}

std::tuple<Tensor, Tensor> weighted_linear_ce_backward_op(OptTensor grad_sum, OptTensor grad_nll,
                                                          Tensor hidden, Tensor weight,
                                                          Tensor targets, Tensor w, Tensor lse,
                                                          bool of_hidden, bool of_weight,
                                                          int64_t chunk, int64_t ignore_index) {
  constexpr auto kOp = "weighted_linear_ce_backward";
  const Call call(kOp, hidden, weight, targets, w, chunk, ignore_index);
  const OptTensor of_sum = check_row_floats(kOp, "grad_sum", grad_sum, hidden, true);
  const std::vector<float> of_nll =
      gathered(call.rows, check_row_floats(kOp, "grad_nll", grad_nll, hidden));
  const std::vector<float> lses = gathered(call.rows, check_row_floats(kOp, "lse", lse, hidden));
  const float one = of_sum ? *data_as<float>(*of_sum) : 0.0f;
  const Gradients g = room_for_gradients(call.c, of_hidden, of_weight);
  LinearLoss(call.c, call.rows, false)
      .backward(
          lses.data(),
          [&](int64_t i) {
            return loss_slopes(one * call.rows.weight[i] + of_nll[i], 0.0f, lses[i], 0.0f);
          },
          g.out);
  return {g.hidden, g.weight};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("weighted_linear_ce", TORCH_BOX(&tenfold::cpu::weighted_linear_ce_op));
  m.impl("weighted_linear_ce_forward", TORCH_BOX(&tenfold::cpu::weighted_linear_ce_forward_op));
  m.impl("weighted_linear_ce_grads", TORCH_BOX(&tenfold::cpu::weighted_linear_ce_grads_op));
  m.impl("weighted_linear_ce_backward", TORCH_BOX(&tenfold::cpu::weighted_linear_ce_backward_op));
}
