// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of last_token_reward and pairwise_logsigmoid share: checks.
#pragma once

#include <optional>
#include <string>

#include "core/check.h"
#include "core/contiguous.h"
#include "core/tensor.h"
#include "loss/pair_loss.h"
#include "loss/token_reward.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

struct RewardCall {
  Tensor mask, weight;  // [N, S] with contiguous rows; [C, H] or [H], contiguous
  int64_t rows, length, dim, classes, mask_stride;
  bool vector;  // weight is [H], and so a reward is [N]
  PoolTokens pool;
};

// hidden: contiguous along H. Whether every row has a token is checked on the CPU only.
struct RewardForward : RewardCall {
  Tensor hidden;
  int64_t row_stride, token_stride;  // elements
};
RewardForward check_reward(const char* op, const Tensor& hidden, const Tensor& mask,
                           const Tensor& w_v, const std::string& pool);

// grad float32 [N] or [N, C], pooled float32 [N, H], both contiguous.
struct RewardBackward : RewardCall {
  Tensor grad, pooled;
};
RewardBackward check_reward_backward(const char* op, const Tensor& grad, const Tensor& pooled,
                                     const Tensor& mask, const Tensor& w_v, const Tensor& like,
                                     const std::string& pool);

struct PairCall {
  Tensor pos, neg;   // [B], contiguous
  OptTensor margin;  // float32 [B], contiguous
  int64_t pairs;
  float center;
};
PairCall check_pairs(const char* op, const Tensor& r_pos, const Tensor& r_neg,
                     const OptTensor& margin, double center);

}  // namespace tenfold
