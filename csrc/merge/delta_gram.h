// SPDX-License-Identifier: Apache-2.0
// delta_gram: G[j][k] = sum over elements of (x_j - base)(x_k - base), in float64 throughout.
//
// The tensor is cut into parts of kGramPart elements, each part into strips of kGramStrip; a
// strip's dot products have 8 partial sums. Parts are added in order, so the number of threads
// changes nothing. Traffic: every input once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"
#include "merge/dare.h"

namespace tenfold {

constexpr int64_t kGramPart = 1 << 15, kGramStrip = 256;

struct GramInput {
  const void* base;  // may be null
  Dtype dtype;
  int experts;
  const void* expert[kMaxExperts];
};

// Adds the products of elements [begin, end) to the upper triangle of gram [experts, experts].
// rows: room for experts * kGramStrip.
TENFOLD_ISA_DECLARE(void gram_part(const GramInput& in, int64_t begin, int64_t end, double* rows,
                                   double* gram))

}  // namespace tenfold
