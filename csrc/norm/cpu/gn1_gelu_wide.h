// SPDX-License-Identifier: Apache-2.0
// gn1_gelu of float64: the definition, in double, for gradient checks.
#pragma once

#include "norm/gn1_gelu_ops.h"

namespace tenfold::cpu {

void wide_forward(const Gn1Call& c, const Tensor* mean, const Tensor* rstd);
void wide_backward(const Gn1GradCall& c);

}  // namespace tenfold::cpu
