// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of outer_dot share: checks.
#pragma once

#include "core/check.h"
#include "core/tensor.h"
#include "influence/outer_dot.h"

namespace tenfold {

struct OuterDotCall {
  Tensor j, x, j2, x2;  // contiguous rows
  int64_t n, t, m, s, v, d;
  bool paired;
  bool single;  // no dimension of examples
};
OuterDotCall check_outer_dot(const Tensor& j, const Tensor& x, const Tensor& j2, const Tensor& x2,
                             bool paired);
TokenRows token_rows(const Tensor& t);
// [N, M], [N] or [].
Tensor new_scores(const OuterDotCall& c);

}  // namespace tenfold
