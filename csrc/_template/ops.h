// SPDX-License-Identifier: Apache-2.0
// Argument checks shared by the CPU and CUDA registrations.
#pragma once

#include "core/check.h"

namespace tenfold {

void check_template_scale(const Tensor& x, double scale);

}  // namespace tenfold
