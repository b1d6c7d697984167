// SPDX-License-Identifier: Apache-2.0
// CUDA registration of last_token_reward and pairwise_logsigmoid with their gradients. A row
// without a real token cannot be reported: its reward is NaN.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "loss/cuda/reward_kernel.cuh"
#include "loss/reward_ops.h"

namespace tenfold::cuda {
namespace {

HeadWeights head_of(const RewardCall& c) {
  return {c.weight.data_ptr(), to_dtype(c.weight.scalar_type())};
}

const uint8_t* mask_of(const RewardCall& c) {
  return static_cast<const uint8_t*>(c.mask.data_ptr());
}

// pooled: or null.
Tensor forward(const char* op, const RewardForward& c, float* pooled) {
  const int64_t blocks = reward_blocks(c.dim);
  check_grid(op, c.rows * blocks);
  const Launch launch(c.hidden);
  const Tensor out = c.vector ? new_output(c.hidden, {c.rows}, ScalarType::Float)
                              : new_output(c.hidden, {c.rows, c.classes}, ScalarType::Float);
  const Tensor parts =
      new_output(c.hidden, {blocks > 1 ? c.rows * blocks * c.classes : 0}, ScalarType::Float);
  RewardArgs a{};
  a.hidden = c.hidden.data_ptr(), a.mask = mask_of(c), a.weight = head_of(c);
  a.rows = c.rows, a.length = c.length, a.dim = c.dim, a.classes = c.classes;
  a.row_stride = c.row_stride, a.token_stride = c.token_stride, a.mask_stride = c.mask_stride;
  a.pool = c.pool;
  a.pooled = pooled, a.parts = data_as<float>(parts), a.reward = data_as<float>(out);
  dispatch_dtype(c.hidden.scalar_type(), op,
                 [&]<class T>() { launch_reward<T>(a, launch.stream); });
  launch.check();
  return out;
}

Tensor last_token_reward_op(Tensor hidden, Tensor mask, Tensor w_v, std::string pool) {
  constexpr auto kOp = "last_token_reward";
  return forward(kOp, check_reward(kOp, hidden, mask, w_v, pool), nullptr);
}

std::tuple<Tensor, Tensor> last_token_reward_forward_op(Tensor hidden, Tensor mask, Tensor w_v,
                                                        std::string pool) {
  constexpr auto kOp = "last_token_reward_forward";
  const RewardForward c = check_reward(kOp, hidden, mask, w_v, pool);
  const Tensor pooled = new_output(hidden, {c.rows, c.dim}, ScalarType::Float);
  const Tensor reward = forward(kOp, c, data_as<float>(pooled));
  return {reward, pooled};
}

std::tuple<Tensor, Tensor> last_token_reward_backward_op(Tensor grad, Tensor pooled, Tensor mask,
                                                         Tensor w_v, Tensor like, bool of_hidden,
                                                         bool of_weight, std::string pool) {
  constexpr auto kOp = "last_token_reward_backward";
  const RewardBackward c = check_reward_backward(kOp, grad, pooled, mask, w_v, like, pool);
  check_grid(kOp, c.rows * (c.length / kRewardTokens + 1));
  const Launch launch(c.pooled);
  RewardGradArgs a{};
  a.grad = data_as<const float>(c.grad), a.pooled = data_as<const float>(c.pooled);
  a.mask = mask_of(c), a.weight = head_of(c);
  a.rows = c.rows, a.length = c.length, a.dim = c.dim, a.classes = c.classes;
  a.mask_stride = c.mask_stride, a.pool = c.pool;
  const ScalarType of_like = like.scalar_type(), of_head = w_v.scalar_type();
  const Tensor to_hidden = of_hidden ? new_output(like, {c.rows, c.length, c.dim}, of_like)
                                     : new_output(like, {0}, of_like);
  const Tensor to_weight = !of_weight ? new_output(pooled, {0}, of_head)
                           : c.vector ? new_output(pooled, {c.dim}, of_head)
                                      : new_output(pooled, {c.classes, c.dim}, of_head);
  if (of_hidden) {
    a.out = to_hidden.data_ptr();
    dispatch_dtype(of_like, kOp, [&]<class T>() { launch_reward_hidden<T>(a, launch.stream); });
  }
  if (of_weight) {
    a.out = to_weight.data_ptr();
    dispatch_dtype(of_head, kOp, [&]<class T>() { launch_reward_weight<T>(a, launch.stream); });
  }
  launch.check();
  return {to_hidden, to_weight};
}

PairArgs pair_args(const PairCall& c) {
  PairArgs a{};
  a.pos = c.pos.data_ptr(), a.neg = c.neg.data_ptr();
  a.margin = c.margin ? data_as<const float>(*c.margin) : nullptr;
  a.pairs = c.pairs, a.center = c.center;
  return a;
}

// of_pos, of_neg: or null.
std::tuple<Tensor, Tensor> pair_loss(const char* op, const PairCall& c, float* of_pos,
                                     float* of_neg) {
  const Launch launch(c.pos);
  const Tensor loss = new_output(c.pos, {}, ScalarType::Float);
  const Tensor delta = new_output(c.pos, {c.pairs}, ScalarType::Float);
  PairArgs a = pair_args(c);
  a.loss = data_as<float>(loss), a.delta = data_as<float>(delta);
  a.of_pos = of_pos, a.of_neg = of_neg;
  dispatch_dtype(c.pos.scalar_type(), op,
                 [&]<class T>() { launch_pair_loss<T>(a, launch.stream); });
  launch.check();
  return {loss, delta};
}

std::tuple<Tensor, Tensor> pairwise_logsigmoid_op(Tensor r_pos, Tensor r_neg, OptTensor margin,
                                                  double center) {
  constexpr auto kOp = "pairwise_logsigmoid";
  return pair_loss(kOp, check_pairs(kOp, r_pos, r_neg, margin, center), nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_logsigmoid_grads_op(Tensor r_pos, Tensor r_neg,
                                                                        OptTensor margin,
                                                                        double center) {
  constexpr auto kOp = "pairwise_logsigmoid_grads";
  const PairCall c = check_pairs(kOp, r_pos, r_neg, margin, center);
  const Tensor of_pos = new_output(r_pos, {c.pairs}, ScalarType::Float);
  const Tensor of_neg = new_output(r_pos, {c.pairs}, ScalarType::Float);
  const auto [loss, delta] = pair_loss(kOp, c, data_as<float>(of_pos), data_as<float>(of_neg));
  return {loss, delta, of_pos, of_neg};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("last_token_reward", TORCH_BOX(&tenfold::cuda::last_token_reward_op));
  m.impl("last_token_reward_forward", TORCH_BOX(&tenfold::cuda::last_token_reward_forward_op));
  m.impl("last_token_reward_backward", TORCH_BOX(&tenfold::cuda::last_token_reward_backward_op));
  m.impl("pairwise_logsigmoid", TORCH_BOX(&tenfold::cuda::pairwise_logsigmoid_op));
  m.impl("pairwise_logsigmoid_grads", TORCH_BOX(&tenfold::cuda::pairwise_logsigmoid_grads_op));
}
