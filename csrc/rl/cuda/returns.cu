// SPDX-License-Identifier: Apache-2.0
// CUDA registration of macro_pool (with backward), macro_gae, gae, ma_ppo_prepare and
// macro_segment_check.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "rl/cuda/pool_kernel.cuh"
#include "rl/cuda/prepare_kernel.cuh"
#include "rl/returns_ops.h"

namespace tenfold::cuda {
namespace {

Tensor run_pool(const char* op, const PoolCall& call, bool backward) {
  const Launch launch(call.x);
  const Rows& rows = call.seg.layout.rows;
  check_grid(op, rows.count);
  const Tensor spare = new_output(call.x, {pool_spare(rows)}, ScalarType::Int);
  launch_pool(call.params<float>(), backward, data_as<int32_t>(spare), launch.stream);
  launch.check();
  return call.out;
}

Tensor macro_pool_op(Tensor x, Tensor seg, int64_t count, std::string weight,
                     OptTensor cu_seqlens) {
  return run_pool("macro_pool", check_pool(x, seg, count, weight, cu_seqlens), false);
}

Tensor macro_pool_backward_op(Tensor grad, Tensor seg, int64_t count, std::string weight,
                              OptTensor cu_seqlens) {
  return run_pool("macro_pool_backward", check_pool_backward(grad, seg, count, weight, cu_seqlens),
                  true);
}

std::tuple<Tensor, Tensor> run_gae(const char* op, const GaeCall& call) {
  const Launch launch(call.value);
  check_grid(op, call.layout.rows.count);
  launch_gae(call.params<float>(), launch.stream);
  launch.check();
  return {call.adv, call.ret};
}

std::tuple<Tensor, Tensor> macro_gae_op(Tensor value, Tensor reward, Tensor nseg, OptTensor length,
                                        double gamma, double lam, OptTensor bootstrap) {
  return run_gae("macro_gae", check_macro_gae(value, reward, nseg, length, gamma, lam, bootstrap));
}

std::tuple<Tensor, Tensor> gae_op(Tensor value, Tensor reward, Tensor mask, double gamma,
                                  double lam, OptTensor bootstrap, OptTensor cu_seqlens) {
  return run_gae("gae", check_gae(value, reward, mask, gamma, lam, bootstrap, cu_seqlens));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ma_ppo_prepare_op(
    Tensor logp_old, Tensor logp_ref, Tensor value_old, Tensor score, Tensor seg, Tensor nseg,
    double beta, double gamma, double lam, double score_clip, std::string sigma,
    std::string reward_reduce, std::string discount, std::string kl, OptTensor bootstrap,
    OptTensor cu_seqlens) {
  const PrepareCall call = check_prepare(
      logp_old, logp_ref, value_old, score, seg, nseg,
      to_prepare_rule(beta, gamma, lam, score_clip, sigma, reward_reduce, discount, kl), bootstrap,
      cu_seqlens);
  const Launch launch(call.old);
  const Rows& rows = call.seg.layout.rows;
  check_grid("ma_ppo_prepare", rows.count);
  const Tensor spare =
      new_output(call.old, {spare_ints(rows, shared_tokens(rows))}, ScalarType::Int);
  launch_prepare(call.params<float>(), data_as<int32_t>(spare), launch.stream);
  launch.check();
  return {call.adv, call.ret, call.adv_m, call.ret_m, call.kl_row};
}

Tensor macro_segment_check_op(Tensor seg, OptTensor nseg, int64_t limit, OptTensor cu_seqlens) {
  const CheckCall call = check_segment_check(seg, nseg, limit, cu_seqlens);
  const Launch launch(call.seg.seg);
  check_grid("macro_segment_check", call.p.rows.count);
  launch_segment_check(call.p, launch.stream);
  launch.check();
  return call.wrong;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("macro_pool", TORCH_BOX(&tenfold::cuda::macro_pool_op));
  m.impl("macro_pool_backward", TORCH_BOX(&tenfold::cuda::macro_pool_backward_op));
  m.impl("macro_gae", TORCH_BOX(&tenfold::cuda::macro_gae_op));
  m.impl("gae", TORCH_BOX(&tenfold::cuda::gae_op));
  m.impl("ma_ppo_prepare", TORCH_BOX(&tenfold::cuda::ma_ppo_prepare_op));
  m.impl("macro_segment_check", TORCH_BOX(&tenfold::cuda::macro_segment_check_op));
}
