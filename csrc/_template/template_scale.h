// SPDX-License-Identifier: Apache-2.0
// template_scale: y = x * scale. A family to copy, built and tested like every other.
//
// x: float32, bfloat16 or float16, any shape; scale: finite. float32 arithmetic, one rounding.
// Traffic: x read once, y written once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

TENFOLD_ISA_DECLARE(void template_scale(const void* x, void* y, Dtype dtype, int64_t n,
                                        float scale))

}  // namespace tenfold
