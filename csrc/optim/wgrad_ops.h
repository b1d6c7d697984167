// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of linear_wgrad_rows share: argument checks. Values of `rows`
// are checked on the CPU only.
#pragma once

#include "core/check.h"

namespace tenfold {

// Sizes of a call, and its operands as [T, out] and [T, in] with contiguous tokens.
struct WgradCall {
  Tensor grad_out, input;
  int64_t tokens, num_out, num_in, num_rows;
};

WgradCall check_linear_wgrad_rows(const Tensor& grad_out, const Tensor& input, const Tensor& rows);

}  // namespace tenfold
