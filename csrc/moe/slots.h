// SPDX-License-Identifier: Apache-2.0
// moe_sort, moe_permute and moe_combine (UpIT section 7). Slot q = t k + j is the j-th choice of
// token t; S = T k of them.
//
//   moe_sort     order[p] = the slot at position p, all slots of expert 0 first, those of an expert
//                as they come; inverse[order[p]] = p; counts [n]; offsets [n + 1] of the experts.
//                A slot whose expert is n or more is left out: its inverse is -1, and so are the
//                last entries of order.
//   moe_permute  y[p] = x[order[p] / k], zeros for -1
//   moe_combine  out[t] = sum over j of weight[t, j] y[inverse[t k + j]], -1 left out
//
// The sort counts and then places, chunk by chunk of kSortChunk slots: two passes over the index.
// Rows move once; sums are float32, over j in order, and every row of a result has one owner.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kSortChunk = 16384;

// out = sum of weight[j] rows[j] (1 each if null), d numbers; zeros of no rows.
TENFOLD_ISA_DECLARE_BF16(void sum_slots(const void* const* rows, const float* weight, int64_t count,
                                        Dtype dtype, int64_t d, void* out))
// grad_y = weight grad_out (unless null); returns <grad_out, y> (0 if y is null).
TENFOLD_ISA_DECLARE_BF16(float slot_grad(const void* grad_out, const void* y, float weight,
                                         Dtype dtype, int64_t d, void* grad_y))

}  // namespace tenfold
