// SPDX-License-Identifier: Apache-2.0
// What the CUDA registrations of the merge operations share.
#pragma once

#include "core/stream.h"
#include "merge/merge_ops.h"

namespace tenfold::cuda {

// A merge without cuts. weight: on the device, or null for those of m.
void run_delta_merge(const char* op, const DeltaMerge& m, int64_t n, const float* weight,
                     const Launch& launch);
void run_weighted_sum(const char* op, const WeightedSum& m, int64_t n, const float* weight,
                      const Launch& launch);

}  // namespace tenfold::cuda
