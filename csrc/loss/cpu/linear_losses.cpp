// SPDX-License-Identifier: Apache-2.0
// CPU registration of linear_cross_entropy and linear_logprob with their gradients.
#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "loss/cpu/linear_rows.h"

namespace tenfold::cpu {
namespace {

CountedRows rows_with_id(const LinearLossCall& c) {
  CountedRows rows;
  for (int64_t i = 0; i < c.rows; ++i) {
    const int64_t id = integer_at(c.target, i);
    if (id < 0 || id >= c.vocab) continue;
    rows.row.push_back(i);
    rows.target.push_back(id);
  }
  return rows;
}

// What a mean or a sum is divided by.
double divisor(const LinearLossCall& c, const CountedRows& rows) {
  if (c.reduction != LossReduction::mean || rows.row.empty()) return 1.0;
  double total = 0.0;
  for (const float w : rows.weight) total += w;
  return total;
}

std::tuple<Tensor, Tensor> losses(const LinearLossCall& c, const CountedRows& rows,
                                  const RowSums& sums) {
  std::vector<float> each(rows.row.size());
  double total = 0.0;
  for (size_t i = 0; i < each.size(); ++i) {
    const double lse = sums.lse[i];
    const double loss = rows.weight[i] * (c.z_loss * lse * lse - sums.logp[i]);
    each[i] = static_cast<float>(loss);
    total += loss;
  }
  const Tensor lse = spread(c, rows, sums.lse);
  if (c.reduction == LossReduction::none) return {spread(c, rows, each), lse};
  const Tensor loss = new_output(c.hidden, {}, ScalarType::Float);
  *data_as<float>(loss) = static_cast<float>(total / divisor(c, rows));
  return {loss, lse};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_op(Tensor hidden, Tensor weight, Tensor target,
                                                   OptTensor row_weight, int64_t ignore_index,
                                                   std::string reduction, double softcap,
                                                   double z_loss, double temperature) {
  constexpr auto kOp = "linear_cross_entropy";
  const LinearLossCall c = check_linear_loss(kOp, hidden, weight, target, row_weight, ignore_index,
                                             reduction, softcap, z_loss, temperature);
  const CountedRows rows = counted_rows(kOp, c);
  RowSums sums = room_for_sums(rows, false);
  LinearLoss(c, rows, false).forward(&sums);
  return losses(c, rows, sums);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_grads_op(
    Tensor hidden, Tensor weight, Tensor target, bool of_hidden, bool of_weight,
    OptTensor row_weight, int64_t ignore_index, std::string reduction, double softcap,
    double z_loss, double temperature) {
  constexpr auto kOp = "linear_cross_entropy_grads";
  const LinearLossCall c = check_linear_loss(kOp, hidden, weight, target, row_weight, ignore_index,
                                             reduction, softcap, z_loss, temperature);
  TENFOLD_CHECK_VALUE(c.reduction != LossReduction::none, "tenfold::", kOp,
                      ": reduction must be mean or sum, got none");
  const CountedRows rows = counted_rows(kOp, c);
  RowSums sums = room_for_sums(rows, false);
  const Gradients g = room_for_gradients(c, of_hidden, of_weight);
  const auto one = static_cast<float>(1.0 / divisor(c, rows));
  LinearLoss(c, rows, false)
      .forward_gradients(
          &sums,
          [&](int64_t i) { return loss_slopes(one * rows.weight[i], 0.0f, sums.lse[i], c.z_loss); },
          g.out);
  const auto [loss, lse] = losses(c, rows, sums);
  return {loss, lse, g.hidden, g.weight};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_backward_op(
    OptTensor grad_loss, OptTensor grad_lse, Tensor hidden, Tensor weight, Tensor target,
    Tensor lse, bool of_hidden, bool of_weight, OptTensor row_weight, int64_t ignore_index,
    std::string reduction, double softcap, double z_loss, double temperature) {
  constexpr auto kOp = "linear_cross_entropy_backward";
  const LinearLossCall c = check_linear_loss(kOp, hidden, weight, target, row_weight, ignore_index,
                                             reduction, softcap, z_loss, temperature);
  const bool each = c.reduction == LossReduction::none;
  const OptTensor of_loss = check_row_floats(kOp, "grad_loss", grad_loss, hidden, !each);
  const OptTensor of_lse = check_row_floats(kOp, "grad_lse", grad_lse, hidden);
  const CountedRows rows = counted_rows(kOp, c);
  const std::vector<float> lses = gathered(rows, check_row_floats(kOp, "lse", lse, hidden));
  const std::vector<float> up = gathered(rows, each ? of_loss : std::nullopt);
  const std::vector<float> up_lse = gathered(rows, of_lse);
  const double one = !each && of_loss ? *data_as<float>(*of_loss) / divisor(c, rows) : 0.0;
  const Gradients g = room_for_gradients(c, of_hidden, of_weight);
  LinearLoss(c, rows, false)
      .backward(
          lses.data(),
          [&](int64_t i) {
            const float mine = each ? up[i] : static_cast<float>(one);
            return loss_slopes(mine * rows.weight[i], up_lse[i], lses[i], c.z_loss);
          },
          g.out);
  return {g.hidden, g.weight};
}

std::tuple<Tensor, Tensor, Tensor> linear_logprob_op(Tensor hidden, Tensor weight, Tensor ids,
                                                     double temperature) {
  const LinearLossCall c = check_linear_logprob("linear_logprob", hidden, weight, ids, temperature);
  const CountedRows rows = rows_with_id(c);
  RowSums sums = room_for_sums(rows, true);
  LinearLoss(c, rows, true).forward(&sums);
  return {spread(c, rows, sums.logp), spread(c, rows, sums.lse), spread(c, rows, sums.entropy)};
}

std::tuple<Tensor, Tensor> linear_logprob_backward_op(OptTensor grad_logp, OptTensor grad_lse,
                                                      OptTensor grad_entropy, Tensor hidden,
                                                      Tensor weight, Tensor ids, Tensor lse,
                                                      Tensor entropy, bool of_hidden,
                                                      bool of_weight, double temperature) {
  constexpr auto kOp = "linear_logprob_backward";
  const LinearLossCall c = check_linear_logprob(kOp, hidden, weight, ids, temperature);
  const CountedRows rows = rows_with_id(c);
  const auto floats = [&](const char* name, const OptTensor& t) {
    return gathered(rows, check_row_floats(kOp, name, t, hidden));
  };
  const std::vector<float> of_logp = floats("grad_logp", grad_logp);
  const std::vector<float> of_lse = floats("grad_lse", grad_lse);
  const std::vector<float> of_entropy = floats("grad_entropy", grad_entropy);
  const std::vector<float> lses = floats("lse", lse), entropies = floats("entropy", entropy);
  const Gradients g = room_for_gradients(c, of_hidden, of_weight);
  LinearLoss(c, rows, grad_entropy.has_value())
      .backward(
          lses.data(),
          [&](int64_t i) {
            return logprob_slopes(of_logp[i], of_entropy[i], of_lse[i], entropies[i]);
          },
          g.out);
  return {g.hidden, g.weight};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&tenfold::cpu::linear_cross_entropy_op));
  m.impl("linear_cross_entropy_grads", TORCH_BOX(&tenfold::cpu::linear_cross_entropy_grads_op));
  m.impl("linear_cross_entropy_backward",
         TORCH_BOX(&tenfold::cpu::linear_cross_entropy_backward_op));
  m.impl("linear_logprob", TORCH_BOX(&tenfold::cpu::linear_logprob_op));
  m.impl("linear_logprob_backward", TORCH_BOX(&tenfold::cpu::linear_logprob_backward_op));
}
