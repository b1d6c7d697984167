// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of rms_norm share: checks, outputs, and where everything is.
#pragma once

#include <optional>
#include <string>

#include "norm/rms_norm.h"
#include "norm/rows.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

enum class RmsOrder : int { llama, as_t5, as_float };
RmsOrder rms_order_of(const char* op, const std::string& order);
RmsOrder rms_order_of(const char* op, int64_t order);

struct RmsCall {
  RowShape shape;
  Rows x, y;
  std::optional<Rows> residual, sum;
  Tensor weight;
  bool in_place;  // y or sum is over an input
  bool fresh;     // nobody gave them
  RmsRows rows;   // all but rstd and past_caches
};
// y, sum: what is written into; null: fresh tensors, `sum` only if there is a residual.
RmsCall check_rms_norm(const char* op, const Tensor* y, const OptTensor& sum, const Tensor& x,
                       const OptTensor& residual, const Tensor& weight, double eps, RmsOrder order);

struct RmsGradCall {
  RowShape shape;
  Rows grad_y, x;
  std::optional<Rows> grad_sum;
  Tensor weight, rstd, dx, dw;  // dx, dw: empty where they are not asked for
  RmsGradRows rows;             // all but past_caches; dx is null where it is not asked for
};
RmsGradCall check_rms_norm_backward(const Tensor& grad_y, const OptTensor& grad_sum,
                                    const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                    bool of_x, bool of_weight);

}  // namespace tenfold
