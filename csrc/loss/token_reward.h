// SPDX-License-Identifier: Apache-2.0
// last_token_reward (Themis sections 4 and 11, PixelGPT's pooled classifier):
//
//   pooled[i]  = hidden[i, t] of the last token t with mask[i, t], or the mean over those tokens
//   reward[i, c] = pooled[i] . w_v[c]
//
// in float32. hidden [N, S, H]: only tokens that are read are touched, so what lies in padding does
// not matter. Columns go in blocks of kRewardBlock, whose sums are added in order: no result
// depends on the number of threads, nor on padding. Backward needs pooled [N, H] only.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

enum class PoolTokens : int { last, mean };

constexpr int64_t kRewardBlock = 1024;

// Means of columns [0, n) of `count` rows.
TENFOLD_ISA_DECLARE(void mean_of_rows(const void* const* rows, int64_t count, int64_t n,
                                      Dtype dtype, float* out))
TENFOLD_ISA_DECLARE(float dot_floats(const float* x, const float* y, int64_t n))
TENFOLD_ISA_DECLARE(void floats_of(const void* x, int64_t n, Dtype dtype, float* out))
// out = sum of by[c] x[c * stride + i] over c, as the dtype; by_stride: floats between factors.
TENFOLD_ISA_DECLARE(void combine_rows(const float* x, int64_t stride, const float* by,
                                      int64_t by_stride, int64_t count, int64_t n, Dtype dtype,
                                      void* out))

}  // namespace tenfold
