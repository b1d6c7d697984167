// SPDX-License-Identifier: Apache-2.0
// CUDA registration of linear_cross_entropy, linear_logprob and weighted_linear_ce with their
// gradients. A target out of range cannot be reported: it makes the row's loss, and the gradients,
// NaN.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "loss/cuda/lce_launch.h"
#include "loss/linear_ops.h"

namespace tenfold::cuda {
namespace {

void check_indices(const char* op, const LinearLossCall& c) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  TENFOLD_CHECK_VALUE(c.rows <= kMost && c.vocab <= kMost, "tenfold::", op,
                      ": N and V must be below 2^31, got ", c.rows, " and ", c.vocab);
}

LceMatrices matrices(const LinearLossCall& c) {
  const int64_t size = dtype_size(to_dtype(c.hidden.scalar_type()));
  const auto vectors = [&](const Tensor& t, int64_t stride) {
    return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && stride * size % 16 == 0 &&
           c.dim * size % 16 == 0;
  };
  return {c.hidden.data_ptr(),
          c.weight.data_ptr(),
          c.hidden_stride,
          c.weight_stride,
          c.dim,
          c.vocab,
          vectors(c.hidden, c.hidden_stride),
          vectors(c.weight, c.weight_stride),
          c.softcap,
          1.0f / c.temperature};
}

CountArgs count_args(const LinearLossCall& c, bool ids) {
  CountArgs a{};
  a.rows = c.rows, a.vocab = c.vocab;
  a.target = int_array(c.target);
  a.row_weight = floats(c.row_weight);
  a.ids = ids, a.ignore_index = c.ignore_index;
  return a;
}

Tensor row_output(const LinearLossCall& c) {
  return new_output(c.hidden, {c.rows}, ScalarType::Float);
}

template <class F>
void with_dtype(const char* op, const LinearLossCall& c, F&& f) {
  dispatch_dtype(c.hidden.scalar_type(), op, std::forward<F>(f));
}

// A multiple of every tile's rows.
LceLimits limits(const LinearLossCall& c) {
  constexpr int64_t kWhole = 256;
  LceLimits l;
  if (c.chunk > 0) l.chunk_rows = std::min(l.chunk_rows, (c.chunk + kWhole - 1) / kWhole * kWhole);
  return l;
}

struct Losses {
  Tensor loss, lse;
};

// And the rows that count.
Losses forward(const char* op, const LinearLossCall& c, bool gradients, const Room& room,
               cudaStream_t stream, PackedRows* rows) {
  const bool none = c.reduction == LossReduction::none;
  const Tensor lse = row_output(c);
  const Tensor loss = none ? row_output(c) : new_output(c.hidden, {}, ScalarType::Float);
  CountArgs count = count_args(c, false);
  count.zeroed[0] = data_as<float>(lse);
  if (none) count.zeroed[1] = data_as<float>(loss);
  *rows = pack_rows(count, gradients, room, stream);
  JoinArgs out{};
  out.scale = 1.0f / c.temperature, out.z_loss = c.z_loss;
  out.lse = data_as<float>(lse);
  if (none) {
    out.loss = data_as<float>(loss);
  } else {
    out.packed_loss = static_cast<float*>(room(c.rows * 4));
  }
  const LceMatrices m = matrices(c);
  with_dtype(op, c, [&]<class T>() { lce_forward<T>(m, *rows, c.rows, out, {}, room, stream); });
  if (!none)
    launch_total_loss(*rows, out.packed_loss, c.reduction == LossReduction::mean,
                      data_as<float>(loss), stream);
  return {loss, lse};
}

struct Gradients {
  Tensor hidden, weight;
};

// Those that are wanted; the others are empty.
Gradients backward(const char* op, const LinearLossCall& c, bool of_hidden, bool of_weight,
                   SlopesArgs slopes, const PackedRows& rows, const Room& room,
                   cudaStream_t stream) {
  const ScalarType dtype = c.hidden.scalar_type();
  const auto output = [&](bool wanted, int64_t n) {
    return wanted ? new_output(c.hidden, {n, c.dim}, dtype) : new_output(c.hidden, {0}, dtype);
  };
  const Gradients g{output(of_hidden, c.rows), output(of_weight, c.vocab)};
  slopes.rows = rows;
  slopes.z_loss = c.z_loss, slopes.scale = 1.0f / c.temperature;
  slopes.small = dtype == ScalarType::Half;
  launch_slopes(slopes, stream);
  const LceMatrices m = matrices(c);
  with_dtype(op, c, [&]<class T>() {
    lce_backward<T>(m, rows, c.rows, of_hidden ? g.hidden.data_ptr() : nullptr,
                    of_weight ? g.weight.data_ptr() : nullptr, limits(c), room, stream);
  });
  return g;
}

std::tuple<Tensor, Tensor> linear_cross_entropy_op(Tensor hidden, Tensor weight, Tensor target,
                                                   OptTensor row_weight, int64_t ignore_index,
                                                   std::string reduction, double softcap,
                                                   double z_loss, double temperature) {
  constexpr auto kOp = "linear_cross_entropy";
  const LinearLossCall c = check_linear_loss(kOp, hidden, weight, target, row_weight, ignore_index,
                                             reduction, softcap, z_loss, temperature);
  check_indices(kOp, c);
  if (c.rows == 0 && c.reduction == LossReduction::none) return {row_output(c), row_output(c)};
  const Launch launch(c.hidden);
  DeviceMemory memory(c.hidden);
  PackedRows rows;
  const Losses out = forward(kOp, c, false, memory.room(), launch.stream, &rows);
  launch.check();
  return {out.loss, out.lse};
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
  check_indices(kOp, c);
  const Launch launch(c.hidden);
  DeviceMemory memory(c.hidden);
  const Room room = memory.room();
  PackedRows rows;
  const Losses out = forward(kOp, c, true, room, launch.stream, &rows);
  SlopesArgs slopes{};
  slopes.lse = data_as<const float>(out.lse);
  slopes.loss_is_one = true, slopes.mean = c.reduction == LossReduction::mean;
  const Gradients g = backward(kOp, c, of_hidden, of_weight, slopes, rows, room, launch.stream);
  launch.check();
  return {out.loss, out.lse, g.hidden, g.weight};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_backward_op(
    OptTensor grad_loss, OptTensor grad_lse, Tensor hidden, Tensor weight, Tensor target,
    Tensor lse, bool of_hidden, bool of_weight, OptTensor row_weight, int64_t ignore_index,
    std::string reduction, double softcap, double z_loss, double temperature) {
  constexpr auto kOp = "linear_cross_entropy_backward";
  const LinearLossCall c = check_linear_loss(kOp, hidden, weight, target, row_weight, ignore_index,
                                             reduction, softcap, z_loss, temperature);
  check_indices(kOp, c);
  const bool each = c.reduction == LossReduction::none;
  const OptTensor of_loss = check_row_floats(kOp, "grad_loss", grad_loss, c.hidden, !each);
  const OptTensor of_lse = check_row_floats(kOp, "grad_lse", grad_lse, c.hidden);
  const OptTensor lses = check_row_floats(kOp, "lse", lse, c.hidden);
  const Launch launch(c.hidden);
  DeviceMemory memory(c.hidden);
  const Room room = memory.room();
  const PackedRows rows = pack_rows(count_args(c, false), true, room, launch.stream);
  SlopesArgs slopes{};
  slopes.lse = floats(lses);
  slopes.grad_loss = floats(of_loss), slopes.grad_lse = floats(of_lse);
  slopes.each = each, slopes.mean = c.reduction == LossReduction::mean;
  const Gradients g = backward(kOp, c, of_hidden, of_weight, slopes, rows, room, launch.stream);
  launch.check();
  return {g.hidden, g.weight};
}

std::tuple<Tensor, Tensor, Tensor> linear_logprob_op(Tensor hidden, Tensor weight, Tensor ids,
                                                     double temperature) {
  constexpr auto kOp = "linear_logprob";
  const LinearLossCall c = check_linear_logprob(kOp, hidden, weight, ids, temperature);
  check_indices(kOp, c);
  const Tensor logp = row_output(c), lse = row_output(c), entropy = row_output(c);
  if (c.rows == 0) return {logp, lse, entropy};
  const Launch launch(c.hidden);
  DeviceMemory memory(c.hidden);
  const Room room = memory.room();
  CountArgs count = count_args(c, true);
  JoinArgs out{};
  out.scale = 1.0f / c.temperature;
  out.logp = count.zeroed[0] = data_as<float>(logp);
  out.lse = count.zeroed[1] = data_as<float>(lse);
  out.entropy = count.zeroed[2] = data_as<float>(entropy);
  const PackedRows rows = pack_rows(count, false, room, launch.stream);
  const LceMatrices m = matrices(c);
  with_dtype(kOp, c,
             [&]<class T>() { lce_forward<T>(m, rows, c.rows, out, {}, room, launch.stream); });
  launch.check();
  return {logp, lse, entropy};
}

std::tuple<Tensor, Tensor> linear_logprob_backward_op(OptTensor grad_logp, OptTensor grad_lse,
                                                      OptTensor grad_entropy, Tensor hidden,
                                                      Tensor weight, Tensor ids, Tensor lse,
                                                      Tensor entropy, bool of_hidden,
                                                      bool of_weight, double temperature) {
  constexpr auto kOp = "linear_logprob_backward";
  const LinearLossCall c = check_linear_logprob(kOp, hidden, weight, ids, temperature);
  check_indices(kOp, c);
  const OptTensor of_logp = check_row_floats(kOp, "grad_logp", grad_logp, c.hidden);
  const OptTensor of_lse = check_row_floats(kOp, "grad_lse", grad_lse, c.hidden);
  const OptTensor of_entropy = check_row_floats(kOp, "grad_entropy", grad_entropy, c.hidden);
  const OptTensor lses = check_row_floats(kOp, "lse", lse, c.hidden);
  const OptTensor entropies = check_row_floats(kOp, "entropy", entropy, c.hidden);
  const Launch launch(c.hidden);
  DeviceMemory memory(c.hidden);
  const Room room = memory.room();
  const PackedRows rows = pack_rows(count_args(c, true), true, room, launch.stream);
  SlopesArgs slopes{};
  slopes.lse = floats(lses), slopes.entropy = floats(entropies);
  slopes.grad_logp = floats(of_logp), slopes.grad_lse = floats(of_lse);
  slopes.grad_entropy = floats(of_entropy);
  const Gradients g = backward(kOp, c, of_hidden, of_weight, slopes, rows, room, launch.stream);
  launch.check();
  return {g.hidden, g.weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weighted_forward(const char* op,
                                                            const LinearLossCall& c) {
  check_indices(op, c);
  const Launch launch(c.hidden);
  DeviceMemory memory(c.hidden);
  const Room room = memory.room();
  const Tensor loss = new_output(c.hidden, {}, ScalarType::Float);
  const Tensor weight = new_output(c.hidden, {}, ScalarType::Float);
  const Tensor nll = row_output(c), lse = row_output(c);
  CountArgs count = count_args(c, false);
  count.zeroed[0] = data_as<float>(nll), count.zeroed[1] = data_as<float>(lse);
  const PackedRows rows = pack_rows(count, false, room, launch.stream);
  JoinArgs out{};
  out.scale = 1.0;
  out.nll = data_as<float>(nll), out.lse = data_as<float>(lse);
  out.packed_loss = static_cast<float*>(room(c.rows * 4));
  const LceMatrices m = matrices(c);
  with_dtype(op, c, [&]<class T>() {
    lce_forward<T>(m, rows, c.rows, out, limits(c), room, launch.stream);
  });
  launch_total_loss(rows, out.packed_loss, false, data_as<float>(loss), launch.stream,
                    data_as<float>(weight));
  launch.check();
  return {loss, weight, nll, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weighted_linear_ce_forward_op(
    Tensor hidden, Tensor weight, Tensor targets, Tensor w, int64_t chunk, int64_t ignore_index) {
  constexpr auto kOp = "weighted_linear_ce_forward";
  return weighted_forward(
      kOp, check_weighted_loss(kOp, hidden, weight, targets, w, chunk, ignore_index));
}

std::tuple<Tensor, Tensor, Tensor> weighted_linear_ce_op(Tensor hidden, Tensor weight,
                                                         Tensor targets, Tensor w, int64_t chunk,
                                                         int64_t ignore_index,
                                                         std::string grad_of) {
  constexpr auto kOp = "weighted_linear_ce";
  check_grad_of(kOp, grad_of);
  const auto [loss_sum, w_sum, nll, lse] = weighted_forward(
      kOp, check_weighted_loss(kOp, hidden, weight, targets, w, chunk, ignore_index));
  return {loss_sum, w_sum, nll};
}

std::tuple<Tensor, Tensor> weighted_linear_ce_backward_op(OptTensor grad_sum, OptTensor grad_nll,
                                                          Tensor hidden, Tensor weight,
                                                          Tensor targets, Tensor w, Tensor lse,
                                                          bool of_hidden, bool of_weight,
                                                          int64_t chunk, int64_t ignore_index) {
  constexpr auto kOp = "weighted_linear_ce_backward";
  const LinearLossCall c =
      check_weighted_loss(kOp, hidden, weight, targets, w, chunk, ignore_index);
  check_indices(kOp, c);
  const OptTensor of_sum = check_row_floats(kOp, "grad_sum", grad_sum, c.hidden, true);
  const OptTensor of_nll = check_row_floats(kOp, "grad_nll", grad_nll, c.hidden);
  const OptTensor lses = check_row_floats(kOp, "lse", lse, c.hidden);
  const Launch launch(c.hidden);
  DeviceMemory memory(c.hidden);
  const Room room = memory.room();
  const PackedRows rows = pack_rows(count_args(c, false), true, room, launch.stream);
  SlopesArgs slopes{};
  slopes.lse = floats(lses);
  slopes.grad_loss = floats(of_sum), slopes.grad_nll = floats(of_nll);
  const Gradients g = backward(kOp, c, of_hidden, of_weight, slopes, rows, room, launch.stream);
  launch.check();
  return {g.hidden, g.weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weighted_linear_ce_grads_op(
    Tensor hidden, Tensor weight, Tensor targets, Tensor w, bool of_hidden, bool of_weight,
    int64_t chunk, int64_t ignore_index) {
  constexpr auto kOp = "weighted_linear_ce_grads";
  const LinearLossCall c =
      check_weighted_loss(kOp, hidden, weight, targets, w, chunk, ignore_index);
  const auto [loss_sum, w_sum, nll, lse] = weighted_forward(kOp, c);
  const Launch launch(c.hidden);
  DeviceMemory memory(c.hidden);
  const Room room = memory.room();
  const PackedRows rows = pack_rows(count_args(c, false), true, room, launch.stream);
  SlopesArgs slopes{};
  slopes.lse = data_as<const float>(lse), slopes.loss_is_one = true;
  const Gradients g = backward(kOp, c, of_hidden, of_weight, slopes, rows, room, launch.stream);
  launch.check();
  return {loss_sum, w_sum, nll, lse, g.hidden, g.weight};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&tenfold::cuda::linear_cross_entropy_op));
  m.impl("linear_cross_entropy_grads", TORCH_BOX(&tenfold::cuda::linear_cross_entropy_grads_op));
  m.impl("linear_cross_entropy_backward",
         TORCH_BOX(&tenfold::cuda::linear_cross_entropy_backward_op));
  m.impl("linear_logprob", TORCH_BOX(&tenfold::cuda::linear_logprob_op));
  m.impl("linear_logprob_backward", TORCH_BOX(&tenfold::cuda::linear_logprob_backward_op));
  m.impl("weighted_linear_ce", TORCH_BOX(&tenfold::cuda::weighted_linear_ce_op));
  m.impl("weighted_linear_ce_forward", TORCH_BOX(&tenfold::cuda::weighted_linear_ce_forward_op));
  m.impl("weighted_linear_ce_grads", TORCH_BOX(&tenfold::cuda::weighted_linear_ce_grads_op));
  m.impl("weighted_linear_ce_backward", TORCH_BOX(&tenfold::cuda::weighted_linear_ce_backward_op));
}
