// SPDX-License-Identifier: Apache-2.0
// CPU registration of dare_merge and ties_merge.
#include "merge/delta_merge.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "merge/cpu/merge_host.h"

namespace tenfold::cpu {
namespace {

// Multiplies each weight by what dropping took from the norm of its task vector.
void rescale_by_norms(DeltaMerge* m, int64_t n, bool squared) {
  const int64_t parts = (n + kMergePart - 1) / kMergePart;
  std::vector<double> sums(2 * parts * m->experts);
  for_each_part(n, kMergePart, 40.0 * m->experts, [&](int64_t begin, int64_t end) {
    double* const all = sums.data() + begin / kMergePart * 2 * m->experts;
    TENFOLD_ISA_CALL(delta_norms, *m, begin, end, squared, all, all + m->experts);
  });
  for (int e = 0; e < m->experts; ++e) {
    double all = 0.0, kept = 0.0;
    for (int64_t i = 0; i < parts; ++i) {
      all += sums[2 * i * m->experts + e];
      kept += sums[(2 * i + 1) * m->experts + e];
    }
    double factor = kept > 0.0 ? all / kept : 1.0;
    if (squared) factor = std::sqrt(factor);
    m->weight[e] = static_cast<float>(m->weight[e] * factor);
  }
}

void run(DeltaMergeArgs args) {
  DeltaMerge& m = args.kernel;
  const int64_t n = args.tensors.out.numel();
  if (m.pick == Pick::random && (args.rescale == Rescale::l1 || args.rescale == Rescale::l2))
    rescale_by_norms(&m, n, args.rescale == Rescale::l2);
  if (m.pick == Pick::largest) return run_ties_merge(m, n, args.kept);
  run_delta_merge(m, n);
}

Tensor dare_merge_op(Tensor base, std::vector<Tensor> experts, std::vector<double> weights,
                     std::vector<double> drop, int64_t seed, int64_t stream, int64_t offset,
                     std::string rescale, bool elect_sign, bool normalize, double lambda) {
  DeltaMergeArgs args =
      check_dare_merge("dare_merge", std::nullopt, base, experts, weights, drop, seed, stream,
                       offset, rescale, elect_sign, normalize, lambda);
  run(args);
  return args.tensors.out;
}

void dare_merge_out_op(Tensor out, Tensor base, std::vector<Tensor> experts,
                       std::vector<double> weights, std::vector<double> drop, int64_t seed,
                       int64_t stream, int64_t offset, std::string rescale, bool elect_sign,
                       bool normalize, double lambda) {
  run(check_dare_merge("dare_merge_", out, base, experts, weights, drop, seed, stream, offset,
                       rescale, elect_sign, normalize, lambda));
}

Tensor ties_merge_op(Tensor base, std::vector<Tensor> experts, std::vector<double> weights,
                     std::vector<double> density, bool normalize, double lambda) {
  DeltaMergeArgs args = check_ties_merge("ties_merge", std::nullopt, base, experts, weights,
                                         density, normalize, lambda);
  run(args);
  return args.tensors.out;
}

void ties_merge_out_op(Tensor out, Tensor base, std::vector<Tensor> experts,
                       std::vector<double> weights, std::vector<double> density, bool normalize,
                       double lambda) {
  run(check_ties_merge("ties_merge_", out, base, experts, weights, density, normalize, lambda));
}

}  // namespace

void run_delta_merge(DeltaMerge m, int64_t n) {
  if (const auto copy = as_copy(m)) return run_weighted_sum(*copy, n);
  m.past_caches = leaves_caches(m, n);
  const double micros = (m.pick == Pick::random ? 15.0 : 8.0) * (m.experts + 1);
  for_each_part(n, kMergePart, micros, [&](int64_t begin, int64_t end) {
    int64_t ties[kMaxExperts] = {};
    TENFOLD_ISA_CALL(delta_merge, m, begin, end, ties);
  });
}

}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("dare_merge", TORCH_BOX(&tenfold::cpu::dare_merge_op));
  m.impl("dare_merge_", TORCH_BOX(&tenfold::cpu::dare_merge_out_op));
  m.impl("ties_merge", TORCH_BOX(&tenfold::cpu::ties_merge_op));
  m.impl("ties_merge_", TORCH_BOX(&tenfold::cpu::ties_merge_out_op));
}
