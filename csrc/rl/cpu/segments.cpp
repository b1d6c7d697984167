// CPU registration of the segmentation ops: rows are walked over one by one.
#include "rl/segments.h"

#include <torch/csrc/stable/library.h>

#include "core/parallel.h"
#include "rl/segments_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerToken = 0.003;

void check_lengths(const char* op, const SegmentParams& p) {
  for (int64_t i = 0; i < p.rows * p.num_lengths; ++i)
    TENFOLD_CHECK_VALUE(p.lengths[i] >= 1, "tenfold::", op, ": lengths must be at least 1, got ",
                        p.lengths[i], " at [", i / p.num_lengths, ", ", i % p.num_lengths, "]");
}

void segment_row(const SegmentParams& p, int64_t row) {
  const uint8_t* mask = p.mask + row * p.mask_stride;
  int32_t* seg = p.seg + row * p.width;
  int64_t count = 0;
  for (int64_t j = 0; j < p.width; ++j) count += mask[j] != 0;
  SegmentWalk walk(p, row, count);
  int32_t segments = 0;
  int64_t next = 0, before = -1;
  while (next < p.width && mask[next] == 0) ++next;
  for (int64_t j = 0; j < p.width; ++j) {
    if (mask[j] == 0) {
      seg[j] = -1;
      continue;
    }
    for (next = j + 1; next < p.width && mask[next] == 0;) ++next;
    segments += walk.begins(j, next < p.width ? next : j, before >= 0 && before != j - 1);
    seg[j] = segments - 1;
    before = j;
  }
  p.nseg[row] = segments;
}

std::tuple<Tensor, Tensor> run(const Tensor& mask, const SegmentArgs& a) {
  const SegmentCall call = check_segments(mask, a);
  check_lengths(a.op, call.p);
  parallel_for(call.p.rows, kMicrosPerToken * static_cast<double>(call.p.width),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) segment_row(call.p, row);
               });
  return {call.seg, call.nseg};
}

std::tuple<Tensor, Tensor> fixed_op(Tensor mask, int64_t n, bool isolate_last, std::string holes) {
  return run(mask, {"macro_segment_fixed", SegmentBy::fixed, isolate_last, holes, n});
}

std::tuple<Tensor, Tensor> lengths_op(Tensor mask, Tensor lengths, std::string tail,
                                      bool isolate_last, std::string holes) {
  return run(mask, {"macro_segment_lengths", SegmentBy::lengths, isolate_last, holes, 1, lengths,
                    tail});
}

std::tuple<Tensor, Tensor> ppl_op(Tensor nll, Tensor mask, std::string mode, std::string holes) {
  return run(mask, {"macro_segment_ppl", to_ppl_mode(mode), false, holes, 1, std::nullopt,
                    "one_segment", nll});
}

std::tuple<Tensor, Tensor> starts_op(Tensor starts, Tensor mask, std::string holes) {
  return run(mask, {"macro_segment_starts", SegmentBy::starts, false, holes, 1, std::nullopt,
                    "one_segment", std::nullopt, starts});
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("macro_segment_fixed", TORCH_BOX(&tenfold::cpu::fixed_op));
  m.impl("macro_segment_lengths", TORCH_BOX(&tenfold::cpu::lengths_op));
  m.impl("macro_segment_ppl", TORCH_BOX(&tenfold::cpu::ppl_op));
  m.impl("macro_segment_starts", TORCH_BOX(&tenfold::cpu::starts_op));
}
