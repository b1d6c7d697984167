// SPDX-License-Identifier: Apache-2.0
// CPU registration of linear_merge, slerp_merge and delta_gram.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "core/scratch.h"
#include "merge/cpu/end_products.h"
#include "merge/cpu/merge_host.h"

namespace tenfold::cpu {
namespace {

Tensor linear_merge_op(std::vector<Tensor> tensors, std::vector<double> weights, bool normalize) {
  const LinearMergeArgs args =
      check_linear_merge("linear_merge", std::nullopt, tensors, weights, normalize);
  run_weighted_sum(args.kernel, args.tensors.out.numel());
  return args.tensors.out;
}

void linear_merge_out_op(Tensor out, std::vector<Tensor> tensors, std::vector<double> weights,
                         bool normalize) {
  const LinearMergeArgs args =
      check_linear_merge("linear_merge_", out, tensors, weights, normalize);
  run_weighted_sum(args.kernel, out.numel());
}

// <x, x>, <x, y> and <y, y> of the two ends.
using EndProducts = std::array<double, 3>;

EndProducts quick_products(const GramInput& in, int64_t n) {
  std::vector<EndProducts> partial(ceil_div(n, kGramPart));
  for_each_part(n, kGramPart, 6.0, [&](int64_t begin, int64_t end) {
    TENFOLD_ISA_CALL(end_products, in.expert[0], in.expert[1], in.dtype, begin, end,
                     partial[begin / kGramPart].data());
  });
  EndProducts all{};
  for (const EndProducts& part : partial)
    for (size_t i = 0; i < all.size(); ++i) all[i] += part[i];
  return all;
}

EndProducts products_of(const MergeTensors& tensors, int64_t n) {
  const GramInput in = gram_input(tensors);
  if (in.base == nullptr && in.dtype != Dtype::f32) {
    const EndProducts quick = quick_products(in, n);
    if (std::all_of(quick.begin(), quick.end(), [](double x) { return std::isfinite(x); }))
      return quick;
  }
  double gram[4] = {};
  add_gram(in, n, gram);
  return {gram[0], gram[1], gram[3]};
}

void run_slerp(const MergeTensors& tensors, double t, double dot_threshold) {
  const int64_t n = tensors.out.numel();
  const auto [xx, xy, yy] = products_of(tensors, n);
  const SlerpWeights w = SlerpRule{t, dot_threshold}.weights(xx, xy, yy);
  const std::vector<double> weights{w.first, w.second};
  if (tensors.base) return run_delta_merge(delta_sum_of(tensors, weights), n);
  run_weighted_sum(weighted_sum_of(tensors, weights), n);
}

Tensor slerp_merge_op(Tensor v0, Tensor v1, double t, OptTensor base, double dot_threshold) {
  const MergeTensors tensors =
      check_slerp_merge("slerp_merge", std::nullopt, v0, v1, t, base, dot_threshold);
  run_slerp(tensors, t, dot_threshold);
  return tensors.out;
}

void slerp_merge_out_op(Tensor out, Tensor v0, Tensor v1, double t, OptTensor base,
                        double dot_threshold) {
  run_slerp(check_slerp_merge("slerp_merge_", out, v0, v1, t, base, dot_threshold), t,
            dot_threshold);
}

Tensor delta_gram_op(OptTensor base, std::vector<Tensor> experts) {
  const MergeTensors tensors = check_delta_gram("delta_gram", std::nullopt, base, experts);
  add_gram(gram_input(tensors), experts[0].numel(), data_as<double>(tensors.out));
  return tensors.out;
}

void delta_gram_out_op(Tensor gram, OptTensor base, std::vector<Tensor> experts) {
  const MergeTensors tensors = check_delta_gram("delta_gram_", gram, base, experts);
  add_gram(gram_input(tensors), experts[0].numel(), data_as<double>(gram));
}

}  // namespace

void run_weighted_sum(WeightedSum m, int64_t n) {
  m.past_caches = past_caches(m.out, n * dtype_size(m.dtype), m.term, m.terms);
  for_each_part(n, kMergePart, 6.0 * (m.terms + 1),
                [&](int64_t begin, int64_t end) { TENFOLD_ISA_CALL(weighted_sum, m, begin, end); });
}

void add_gram(const GramInput& in, int64_t n, double* gram) {
  const int m = in.experts;
  const int64_t parts = (n + kGramPart - 1) / kGramPart;
  std::vector<double> partial(parts * m * m);
  const double micros = 8.0 * m + 3.0 * m * m;
  parallel_for(parts, micros, [&](int64_t first, int64_t last) {
    const Scratch rows(m * kGramStrip * static_cast<int64_t>(sizeof(double)));
    for (int64_t i = first; i < last; ++i)
      TENFOLD_ISA_CALL(gram_part, in, i * kGramPart, std::min(n, (i + 1) * kGramPart),
                       static_cast<double*>(rows.data()), partial.data() + i * m * m);
  });
  for (int j = 0; j < m; ++j)
    for (int k = j; k < m; ++k) {
      double sum = 0.0;
      for (int64_t i = 0; i < parts; ++i) sum += partial[(i * m + j) * m + k];
      gram[j * m + k] += sum;
      if (k != j) gram[k * m + j] += sum;
    }
}

}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("linear_merge", TORCH_BOX(&tenfold::cpu::linear_merge_op));
  m.impl("linear_merge_", TORCH_BOX(&tenfold::cpu::linear_merge_out_op));
  m.impl("slerp_merge", TORCH_BOX(&tenfold::cpu::slerp_merge_op));
  m.impl("slerp_merge_", TORCH_BOX(&tenfold::cpu::slerp_merge_out_op));
  m.impl("delta_gram", TORCH_BOX(&tenfold::cpu::delta_gram_op));
  m.impl("delta_gram_", TORCH_BOX(&tenfold::cpu::delta_gram_out_op));
}
