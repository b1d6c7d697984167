// What the CPU and CUDA registrations of the segmentation ops share: checks and outputs.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "core/check.h"
#include "core/tensor.h"
#include "rl/segments.h"

namespace tenfold {

// Arguments beside the mask; those that an op does not have keep their defaults.
struct SegmentArgs {
  const char* op;
  SegmentBy by;
  bool isolate_last = false;
  const std::string& holes;
  int64_t n = 1;
  std::optional<Tensor> lengths = std::nullopt;
  std::string tail = "one_segment";
  std::optional<Tensor> nll = std::nullopt;
  std::optional<Tensor> starts = std::nullopt;
};

// A checked call: parameters, and the tensors that they point to.
struct SegmentCall {
  SegmentParams p;
  Tensor mask, seg, nseg;
  std::optional<Tensor> lengths, nll, starts;
};

// Checks all but the values of tensors, and makes the outputs.
SegmentCall check_segments(const Tensor& mask, const SegmentArgs& a);

// The mode of macro_segment_ppl.
SegmentBy to_ppl_mode(const std::string& mode);

}  // namespace tenfold
