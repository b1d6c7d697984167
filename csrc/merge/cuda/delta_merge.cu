// SPDX-License-Identifier: Apache-2.0
// CUDA registration of dare_merge and ties_merge.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "merge/cuda/merge_host.h"
#include "merge/cuda/norms_kernel.cuh"
#include "merge/cuda/ties_kernel.cuh"

namespace tenfold::cuda {
namespace {

// Weights that undo what dropping took from the norms of the task vectors.
Tensor norm_weights(const char* op, const Tensor& like, const DeltaMerge& m, int64_t n,
                    bool squared, const Launch& launch) {
  NormsArgs a = norms_args(delta_run(m, n, nullptr), squared);
  const Tensor parts = new_output(like, {a.blocks, m.experts, 2}, ScalarType::Double);
  const Tensor weight = new_output(like, {m.experts}, ScalarType::Float);
  a.parts = data_as<double>(parts), a.weight = data_as<float>(weight);
  dispatch_dtype(like.scalar_type(), op, [&]<class T>() { launch_norms<T>(a, launch.stream); });
  return weight;
}

void run_ties_merge(const char* op, const Tensor& like, const DeltaMerge& m, int64_t n,
                    const std::vector<int64_t>& kept, const Launch& launch) {
  TiesArgs a = ties_args(m, n, kept.data());
  check_grid(op, a.tiles);
  constexpr int64_t kWords = sizeof(RadixState) / 8;
  const Tensor state = new_output(like, {m.experts, kWords}, ScalarType::Long);
  const Tensor ties = new_output(like, {m.experts, a.tiles}, ScalarType::Long);
  a.state = static_cast<RadixState*>(state.data_ptr()), a.ties = data_as<int64_t>(ties);
  dispatch_dtype(like.scalar_type(), op,
                 [&]<class T>() { launch_ties_merge<T>(a, launch.stream); });
}

void run(const char* op, const DeltaMergeArgs& args) {
  const DeltaMerge& m = args.kernel;
  const Tensor& out = args.tensors.out;
  const int64_t n = out.numel();
  const Launch launch(out);
  const bool by_norm = args.rescale == Rescale::l1 || args.rescale == Rescale::l2;
  if (m.pick == Pick::largest) {
    run_ties_merge(op, out, m, n, args.kept, launch);
  } else if (m.pick == Pick::random && by_norm && m.experts > 0) {
    const Tensor weight = norm_weights(op, out, m, n, args.rescale == Rescale::l2, launch);
    run_delta_merge(op, m, n, data_as<float>(weight), launch);
  } else {
    run_delta_merge(op, m, n, nullptr, launch);
  }
  launch.check();
}

Tensor dare_merge_op(Tensor base, std::vector<Tensor> experts, std::vector<double> weights,
                     std::vector<double> drop, int64_t seed, int64_t stream, int64_t offset,
                     std::string rescale, bool elect_sign, bool normalize, double lambda) {
  constexpr auto kOp = "dare_merge";
  const DeltaMergeArgs args =
      check_dare_merge(kOp, std::nullopt, base, experts, weights, drop, seed, stream, offset,
                       rescale, elect_sign, normalize, lambda);
  run(kOp, args);
  return args.tensors.out;
}

void dare_merge_out_op(Tensor out, Tensor base, std::vector<Tensor> experts,
                       std::vector<double> weights, std::vector<double> drop, int64_t seed,
                       int64_t stream, int64_t offset, std::string rescale, bool elect_sign,
                       bool normalize, double lambda) {
  constexpr auto kOp = "dare_merge_";
  run(kOp, check_dare_merge(kOp, out, base, experts, weights, drop, seed, stream, offset, rescale,
                            elect_sign, normalize, lambda));
}

Tensor ties_merge_op(Tensor base, std::vector<Tensor> experts, std::vector<double> weights,
                     std::vector<double> density, bool normalize, double lambda) {
  constexpr auto kOp = "ties_merge";
  const DeltaMergeArgs args =
      check_ties_merge(kOp, std::nullopt, base, experts, weights, density, normalize, lambda);
  run(kOp, args);
  return args.tensors.out;
}

void ties_merge_out_op(Tensor out, Tensor base, std::vector<Tensor> experts,
                       std::vector<double> weights, std::vector<double> density, bool normalize,
                       double lambda) {
  constexpr auto kOp = "ties_merge_";
  run(kOp, check_ties_merge(kOp, out, base, experts, weights, density, normalize, lambda));
}

}  // namespace

void run_delta_merge(const char* op, const DeltaMerge& m, int64_t n, const float* weight,
                     const Launch& launch) {
  if (weight == nullptr)
    if (const auto copy = as_copy(m)) return run_weighted_sum(op, *copy, n, nullptr, launch);
  const DeltaRun a = delta_run(m, n, weight);
  check_grid(op, delta_runs(a));
  if (m.dtype == Dtype::f32) return launch_delta_merge<float>(a, launch.stream);
  if (m.dtype == Dtype::bf16) return launch_delta_merge<bf16_t>(a, launch.stream);
  launch_delta_merge<fp16_t>(a, launch.stream);
}

}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("dare_merge", TORCH_BOX(&tenfold::cuda::dare_merge_op));
  m.impl("dare_merge_", TORCH_BOX(&tenfold::cuda::dare_merge_out_op));
  m.impl("ties_merge", TORCH_BOX(&tenfold::cuda::ties_merge_op));
  m.impl("ties_merge_", TORCH_BOX(&tenfold::cuda::ties_merge_out_op));
}
