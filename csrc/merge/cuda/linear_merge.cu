// SPDX-License-Identifier: Apache-2.0
// CUDA registration of linear_merge, slerp_merge and delta_gram.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "merge/cuda/delta_merge_kernel.cuh"
#include "merge/cuda/gram_kernel.cuh"
#include "merge/cuda/merge_host.h"

namespace tenfold::cuda {
namespace {

void run_linear(const char* op, const LinearMergeArgs& args) {
  const Launch launch(args.tensors.out);
  run_weighted_sum(op, args.kernel, args.tensors.out.numel(), nullptr, launch);
  launch.check();
}

Tensor linear_merge_op(std::vector<Tensor> tensors, std::vector<double> weights, bool normalize) {
  constexpr auto kOp = "linear_merge";
  const LinearMergeArgs args = check_linear_merge(kOp, std::nullopt, tensors, weights, normalize);
  run_linear(kOp, args);
  return args.tensors.out;
}

void linear_merge_out_op(Tensor out, std::vector<Tensor> tensors, std::vector<double> weights,
                         bool normalize) {
  constexpr auto kOp = "linear_merge_";
  run_linear(kOp, check_linear_merge(kOp, out, tensors, weights, normalize));
}

// fresh: gram holds nothing yet; else the products are added to it.
void run_gram(const char* op, const MergeTensors& tensors, bool fresh, double* gram,
              const Launch& launch) {
  const Tensor& like = tensors.experts[0];
  GramArgs a = gram_args(gram_input(tensors), like.numel());
  const Tensor parts = new_output(like, {gram_doubles(a)}, ScalarType::Double);
  a.parts = data_as<double>(parts);
  dispatch_dtype(like.scalar_type(), op,
                 [&]<class T>() { launch_gram<T>(a, fresh, gram, launch.stream); });
}

void run_slerp(const char* op, const MergeTensors& tensors, double t, double dot_threshold) {
  const Launch launch(tensors.out);
  const int64_t n = tensors.out.numel();
  const bool at_end = t == 0.0 || t == 1.0;  // then no angle is asked for
  const std::vector<double> ends{1.0 - t, t};
  Tensor weight = new_output(tensors.out, {2}, ScalarType::Float);
  if (!at_end) {
    const Tensor gram = new_output(tensors.out, {2, 2}, ScalarType::Double);
    run_gram(op, tensors, true, data_as<double>(gram), launch);
    launch_slerp_weights({t, dot_threshold}, data_as<double>(gram), data_as<float>(weight),
                         launch.stream);
  }
  const float* const found = at_end ? nullptr : data_as<float>(weight);
  if (tensors.base) {
    run_delta_merge(op, delta_sum_of(tensors, ends), n, found, launch);
  } else {
    run_weighted_sum(op, weighted_sum_of(tensors, ends), n, found, launch);
  }
  launch.check();
}

Tensor slerp_merge_op(Tensor v0, Tensor v1, double t, OptTensor base, double dot_threshold) {
  constexpr auto kOp = "slerp_merge";
  const MergeTensors tensors = check_slerp_merge(kOp, std::nullopt, v0, v1, t, base, dot_threshold);
  run_slerp(kOp, tensors, t, dot_threshold);
  return tensors.out;
}

void slerp_merge_out_op(Tensor out, Tensor v0, Tensor v1, double t, OptTensor base,
                        double dot_threshold) {
  constexpr auto kOp = "slerp_merge_";
  run_slerp(kOp, check_slerp_merge(kOp, out, v0, v1, t, base, dot_threshold), t, dot_threshold);
}

void add_gram(const char* op, const MergeTensors& tensors) {
  const Launch launch(tensors.out);
  run_gram(op, tensors, false, data_as<double>(tensors.out), launch);
  launch.check();
}

Tensor delta_gram_op(OptTensor base, std::vector<Tensor> experts) {
  constexpr auto kOp = "delta_gram";
  const MergeTensors tensors = check_delta_gram(kOp, std::nullopt, base, experts);
  add_gram(kOp, tensors);
  return tensors.out;
}

void delta_gram_out_op(Tensor gram, OptTensor base, std::vector<Tensor> experts) {
  constexpr auto kOp = "delta_gram_";
  add_gram(kOp, check_delta_gram(kOp, gram, base, experts));
}

}  // namespace

void run_weighted_sum(const char* op, const WeightedSum& m, int64_t n, const float* weight,
                      const Launch& launch) {
  const WeightedSumArgs a = weighted_sum_args(m, n, weight);
  check_grid(op, weighted_sum_blocks(a));
  if (m.dtype == Dtype::f32) return launch_weighted_sum<float>(a, launch.stream);
  if (m.dtype == Dtype::bf16) return launch_weighted_sum<bf16_t>(a, launch.stream);
  launch_weighted_sum<fp16_t>(a, launch.stream);
}

}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("linear_merge", TORCH_BOX(&tenfold::cuda::linear_merge_op));
  m.impl("linear_merge_", TORCH_BOX(&tenfold::cuda::linear_merge_out_op));
  m.impl("slerp_merge", TORCH_BOX(&tenfold::cuda::slerp_merge_op));
  m.impl("slerp_merge_", TORCH_BOX(&tenfold::cuda::slerp_merge_out_op));
  m.impl("delta_gram", TORCH_BOX(&tenfold::cuda::delta_gram_op));
  m.impl("delta_gram_", TORCH_BOX(&tenfold::cuda::delta_gram_out_op));
}
