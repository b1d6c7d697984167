// SPDX-License-Identifier: Apache-2.0
// ties_merge of large tensors in one pass: for each expert, a sample gives two magnitudes between
// which its k-th largest lies almost surely. What is above both is kept and what is below is not,
// so the pass already writes the result, but for the elements of which an expert lies in between:
// those are noted, with what they were made from, and merged again once the exact cuts are known.
// Where out is an input, the pass only looks for the cuts. Where the sample misleads, or magnitudes
// repeat so often that too many lie in between, the cuts are found expert by expert.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "merge/delta_merge.h"

namespace tenfold {

// Of each expert, as bits of |expert - base|: all above `last` are kept, none up to `below`.
struct TiesLimits {
  int32_t below[kMaxExperts], last[kMaxExperts];
};

constexpr int64_t kTiesBlock = 4096;  // elements of a call

// Elements [begin, end) of m, kTiesBlock at most. at[j]: those, from begin on, of which an expert
// is in between; returns how many. above[e]: how many more are above the limits. merge: out is
// written, as if none of those in between were kept.
TENFOLD_ISA_DECLARE_BF16(int64_t ties_block(const DeltaMerge& m, const TiesLimits& limits,
                                            bool merge, int64_t begin, int64_t end, uint16_t* at,
                                            int64_t* above))

}  // namespace tenfold
