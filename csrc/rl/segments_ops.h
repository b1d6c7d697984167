// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the segmentation ops share: checks and outputs.
#pragma once

#include <string>

#include "rl/rows_ops.h"
#include "rl/segments.h"

namespace tenfold {

// Arguments beside the mask; those that an op does not have keep their defaults.
struct SegmentArgs {
  const char* op;
  SegmentBy by;
  const std::string& holes;
  const OptTensor& cu_seqlens;
  bool isolate_last = false;
  int64_t n = 1;
  OptTensor lengths = std::nullopt;
  std::string tail = "one_segment";
  OptTensor nll = std::nullopt;
  OptTensor starts = std::nullopt;
};

// A checked call: parameters, and the tensors that they point to.
struct SegmentCall {
  SegmentParams p;
  Layout layout;
  Tensor mask, seg, nseg;
  OptTensor lengths, nll, starts;
};

// Checks all but the values of `lengths`, and makes the outputs.
SegmentCall check_segments(const Tensor& mask, const SegmentArgs& a);

// The mode of macro_segment_ppl.
SegmentBy to_ppl_mode(const std::string& mode);

// The four ops, with run(mask, args) -> (seg, nseg) for a backend.
template <auto kRun>
struct SegmentOps {
  using Made = std::tuple<Tensor, Tensor>;

  static Made fixed(Tensor mask, int64_t n, bool isolate_last, std::string holes, OptTensor cu) {
    return kRun(mask, {"macro_segment_fixed", SegmentBy::fixed, holes, cu, isolate_last, n});
  }
  static Made lengths(Tensor mask, Tensor lengths, std::string tail, bool isolate_last,
                      std::string holes, OptTensor cu) {
    return kRun(mask, {"macro_segment_lengths", SegmentBy::lengths, holes, cu, isolate_last, 1,
                       lengths, tail});
  }
  static Made ppl(Tensor nll, Tensor mask, std::string mode, std::string holes, OptTensor cu) {
    return kRun(mask, {"macro_segment_ppl", to_ppl_mode(mode), holes, cu, false, 1, std::nullopt,
                       "one_segment", nll});
  }
  static Made starts(Tensor starts, Tensor mask, std::string holes, OptTensor cu) {
    return kRun(mask, {"macro_segment_starts", SegmentBy::starts, holes, cu, false, 1, std::nullopt,
                       "one_segment", std::nullopt, starts});
  }
};

}  // namespace tenfold
