// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of linear_cross_entropy, linear_logprob and
// weighted_linear_ce share: argument checks. Values of targets are checked on the CPU only.
#pragma once

#include <optional>
#include <string>

#include "core/check.h"
#include "core/tensor.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

enum class LossReduction : int { none, mean, sum };

struct LinearLossCall {
  Tensor hidden, weight, target;  // [N, H], [V, H] with contiguous rows; [N], contiguous
  OptTensor row_weight;           // float32 [N], contiguous
  int64_t rows, dim, vocab, hidden_stride, weight_stride;
  int64_t ignore_index;
  LossReduction reduction;
  float softcap, z_loss, temperature;
  int64_t chunk = 0;  // rows at a time, at most; 0: as the kernel likes
};

LinearLossCall check_linear_loss(const char* op, const Tensor& hidden, const Tensor& weight,
                                 const Tensor& target, const OptTensor& row_weight,
                                 int64_t ignore_index, const std::string& reduction, double softcap,
                                 double z_loss, double temperature);

LinearLossCall check_linear_logprob(const char* op, const Tensor& hidden, const Tensor& weight,
                                    const Tensor& ids, double temperature);

// weighted_linear_ce: a sum, with w as row_weight.
LinearLossCall check_weighted_loss(const char* op, const Tensor& hidden, const Tensor& weight,
                                   const Tensor& targets, const Tensor& w, int64_t chunk,
                                   int64_t ignore_index);
void check_grad_of(const char* op, const std::string& name);

// float32 [N], one per row of `of` and on its device, or 0-d where `scalar`; contiguous.
OptTensor check_row_floats(const char* op, const char* arg, const OptTensor& t, const Tensor& of,
                           bool scalar = false, const char* of_name = "hidden");

// Null where there is none.
inline const float* floats(const OptTensor& t) {
  return t ? data_as<const float>(*t) : nullptr;
}

}  // namespace tenfold
