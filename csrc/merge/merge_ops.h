// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the merge operations share: argument checks, and how their
// arguments become those of a kernel.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/tensor.h"
#include "merge/delta_gram.h"
#include "merge/delta_merge.h"
#include "merge/slerp.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

enum class Rescale : int { inv_keep, none, l1, l2 };

// The inputs, contiguous, and where the result goes.
struct MergeTensors {
  OptTensor base;
  std::vector<Tensor> experts;
  Tensor out;
};

// A merge of task vectors; `kernel` has everything but the cuts and the rescaling by norms.
struct DeltaMergeArgs {
  MergeTensors tensors;
  DeltaMerge kernel;
  Rescale rescale = Rescale::inv_keep;
  std::vector<int64_t> kept;  // ties_merge: how many elements of each expert of the kernel
};

// The caller's out, or none: then the op allocates it.
DeltaMergeArgs check_dare_merge(const char* op, const OptTensor& out, const Tensor& base,
                                const std::vector<Tensor>& experts,
                                const std::vector<double>& weights, const std::vector<double>& drop,
                                int64_t seed, int64_t stream, int64_t offset,
                                const std::string& rescale, bool elect, bool normalize,
                                double lambda);

DeltaMergeArgs check_ties_merge(const char* op, const OptTensor& out, const Tensor& base,
                                const std::vector<Tensor>& experts,
                                const std::vector<double>& weights,
                                const std::vector<double>& density, bool normalize, double lambda);

struct LinearMergeArgs {
  MergeTensors tensors;
  WeightedSum kernel;
};

LinearMergeArgs check_linear_merge(const char* op, const OptTensor& out,
                                   const std::vector<Tensor>& tensors,
                                   const std::vector<double>& weights, bool normalize);

// Experts are the two ends.
MergeTensors check_slerp_merge(const char* op, const OptTensor& out, const Tensor& v0,
                               const Tensor& v1, double t, const OptTensor& base,
                               double dot_threshold);

// out = sum of c_e x_e, or base + sum of c_e (x_e - base) if there is a base.
WeightedSum weighted_sum_of(const MergeTensors& tensors, const std::vector<double>& weights);
DeltaMerge delta_sum_of(const MergeTensors& tensors, const std::vector<double>& weights);

// A merge that gives one expert back: base + 1 (x - base) is x, exactly.
std::optional<WeightedSum> as_copy(const DeltaMerge& m);

// The contiguous inputs; experts may be of any number up to kMaxExperts.
MergeTensors check_delta_gram(const char* op, const OptTensor& gram, const OptTensor& base,
                              const std::vector<Tensor>& experts);
GramInput gram_input(const MergeTensors& tensors);

}  // namespace tenfold
