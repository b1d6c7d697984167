// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of masked_adamw_ and masked_adamw_8bit_ share: the checks of
// lists of tensors, and those lists as the kernels see them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "optim/mask_args.h"
#include "optim/masked_adamw_8bit.h"

namespace tenfold {

using Tensors = std::vector<Tensor>;
using OptTensor = std::optional<Tensor>;
using OptTensors = std::vector<OptTensor>;

// The arguments that both ops have, by their names in the schemas.
struct AdamwArgs {
  const Tensors &params, &grads, &exp_avgs, &exp_avg_sqs, &steps;
  const OptTensors& masks;
  const std::string& mask_kind;
  const Tensor& lr;
  double beta1, beta2, weight_decay, eps;
  bool maximize;
  const OptTensor &grad_scale, &found_inf, &clip_coef;
  bool stochastic_round;
  int64_t seed, block_size;
  const std::vector<int64_t>& tensor_ids;
};

struct MaskedAdamwArgs : AdamwArgs {
  const Tensors& max_exp_avg_sqs;
  const OptTensors& prefixes;
  bool amsgrad;
  const std::string& mask_scope;
};

// Everything that can be told without reading tensors; lr only if it is on the CPU (else it is 0 in
// `options`), values of steps, masks and prefixes never.
struct AdamwCall {
  AdamwOptions options;
  std::vector<AdamwTensor> tensors;
};

AdamwCall check_masked_adamw(const MaskedAdamwArgs& a);

struct MaskedAdamw8bitArgs : AdamwArgs {
  const Tensors &absmax1, &absmax2;
  const Tensor &code1, &code2;
};

struct Adamw8bitCall {
  AdamwOptions options;
  std::vector<Adamw8Tensor> tensors;
};

Adamw8bitCall check_masked_adamw_8bit(const MaskedAdamw8bitArgs& a);

// A 0-d floating-point tensor on the CPU.
double read_scalar(const Tensor& t);

}  // namespace tenfold
