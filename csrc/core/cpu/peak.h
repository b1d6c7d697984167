// SPDX-License-Identifier: Apache-2.0
// Ceilings that bench/ measures in the same run as the kernels: what this CPU can do at best.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"

namespace tenfold {

// Each runs `iters` rounds of independent register operations and returns its FLOPs; *sink keeps
// the compiler honest. dot_bf16 returns 0 where the ISA has no bf16 dot product.
TENFOLD_ISA_DECLARE_AMX(double peak_fma_fp32(int64_t iters, float* sink))
TENFOLD_ISA_DECLARE_AMX(double peak_dot_bf16(int64_t iters, float* sink))

// Sum of `n` floats (a multiple of 128) in one pass: what reading alone costs.
TENFOLD_ISA_DECLARE_AMX(float peak_read(const float* data, int64_t n))

}  // namespace tenfold
