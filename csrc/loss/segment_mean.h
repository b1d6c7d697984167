// SPDX-License-Identifier: Apache-2.0
// segment_mean (Themis sections 4 and 11): out[n, t] = mean of nll[n, s] where seg[n, s] = t, for t
// in [0, T); 0 where there is none. Unlike in macro_pool (csrc/rl) segments may be missing, come in
// any order and be more than a row has tokens: the parts of a trace have fixed numbers. A token
// whose number is outside [0, T) is not read.
#pragma once

#include <cstdint>

#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/tensor.h"

namespace tenfold {

struct SegmentMeanCall {
  Tensor x,
      seg;  // nll [N, S] or its mean's gradient [N, T], float32, contiguous; [N, S], contiguous
  int64_t rows, length, segments;
};
SegmentMeanCall check_segment_mean(const char* op, const char* arg, bool backward, const Tensor& x,
                                   const Tensor& seg, int64_t segments);

}  // namespace tenfold
