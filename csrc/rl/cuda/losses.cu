// SPDX-License-Identifier: Apache-2.0
// CUDA registration of PPO's losses.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "rl/cuda/losses_kernel.cuh"
#include "rl/losses_ops.h"

namespace tenfold::cuda {
namespace {

constexpr int64_t kSumDoubles = sizeof(RowSums) / sizeof(double);

LossTarget target(const LossOut& out, bool policy) {
  return {out.mean, policy, data_as<float>(out.loss), data_as<float>(out.stats),
          out.scale ? data_as<double>(*out.scale) : nullptr};
}

RowSums* as_sums(const Tensor& t) {
  return reinterpret_cast<RowSums*>(data_as<double>(t));
}

void policy_loss(const PolicyCall& call) {
  const Launch launch(call.now);
  const PolicyParams<float> p = call.params<float>();
  const Rows& rows = p.seg.rows;
  const int64_t blocks = rows.count * policy_parts(p);
  check_grid("ma_ppo_policy_loss", blocks);
  const int64_t spare = p.rule.ratio == RatioBy::token ? 0 : spare_ints(rows, shared_tokens(rows));
  const Tensor sums = new_output(call.now, {blocks * kSumDoubles}, ScalarType::Double);
  const Tensor first = new_output(call.now, {spare}, ScalarType::Int);
  const Tensor slope = new_output(call.now, {spare}, ScalarType::Float);
  launch_policy(p, target(call.out, true),
                {as_sums(sums), data_as<int32_t>(first), data_as<float>(slope)}, launch.stream);
  launch.check();
}

void value_loss(const ValueCall& call) {
  const Launch launch(call.now);
  const ValueParams<float> p = call.params<float>();
  const int64_t blocks = p.rows.count * row_parts(p.rows);
  check_grid("ma_ppo_value_loss", blocks);
  const Tensor sums = new_output(call.now, {blocks * kSumDoubles}, ScalarType::Double);
  launch_value(p, target(call.out, false), as_sums(sums), launch.stream);
  launch.check();
}

void loss_backward(const SlopeCall& call) {
  const Launch launch(call.slope);
  const SlopeParams<float> p = call.params<float>();
  check_grid("ma_ppo_loss_backward", p.rows.count * row_parts(p.rows));
  launch_slope(p, launch.stream);
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::LossOps<&tenfold::cuda::policy_loss, &tenfold::cuda::value_loss,
                               &tenfold::cuda::loss_backward>;
  m.impl("ma_ppo_policy_loss", TORCH_BOX(&Ops::policy));
  m.impl("ma_ppo_policy_loss_forward", TORCH_BOX(&Ops::policy_forward));
  m.impl("ma_ppo_value_loss", TORCH_BOX(&Ops::value));
  m.impl("ma_ppo_value_loss_forward", TORCH_BOX(&Ops::value_forward));
  m.impl("ma_ppo_loss_backward", TORCH_BOX(&Ops::backward));
}
