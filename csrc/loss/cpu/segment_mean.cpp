// CPU registration of segment_mean and its backward: a row a task.
#include "loss/segment_mean.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "core/parallel.h"
#include "loss/cpu/segment_runs.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerToken = 4e-4;

// f(row, its numbers as int32, -1 where a token is not read) for all rows.
template <class F>
void over_rows(const SegmentMeanCall& c, const F& f) {
  const bool wide = c.seg.scalar_type() == ScalarType::Long;
  const auto* const seg = static_cast<const char*>(c.seg.data_ptr());
  parallel_for(c.rows, kMicrosPerToken * static_cast<double>(c.length + c.segments),
               [&](int64_t begin, int64_t end) {
                 std::vector<int32_t> ids(c.length);
                 for (int64_t i = begin; i < end; ++i) {
                   TENFOLD_ISA_CALL(segments_inside, seg + i * c.length * (wide ? 8 : 4), wide,
                                    c.length, static_cast<int32_t>(c.segments), ids.data());
                   f(i, ids.data());
                 }
               });
}

Tensor segment_mean_op(Tensor nll, Tensor seg, int64_t segments) {
  const SegmentMeanCall c = check_segment_mean("segment_mean", "nll", false, nll, seg, segments);
  const Tensor out = new_output(c.x, {c.rows, segments}, ScalarType::Float);
  over_rows(c, [&](int64_t i, const int32_t* ids) {
    std::vector<double> sums(segments);
    std::vector<int32_t> counts(segments);
    TENFOLD_ISA_CALL(add_segments, data_as<float>(c.x) + i * c.length, ids, c.length, sums.data(),
                     counts.data());
    float* const to = data_as<float>(out) + i * segments;
    for (int64_t t = 0; t < segments; ++t)
      to[t] = counts[t] > 0 ? static_cast<float>(sums[t] / counts[t]) : 0.0f;
  });
  return out;
}

Tensor segment_mean_backward_op(Tensor grad, Tensor seg, int64_t segments) {
  const SegmentMeanCall c =
      check_segment_mean("segment_mean_backward", "grad", true, grad, seg, segments);
  const Tensor out = new_output(c.x, {c.rows, c.length}, ScalarType::Float);
  over_rows(c, [&](int64_t i, const int32_t* ids) {
    std::vector<int32_t> counts(segments);
    std::vector<float> shares(segments);
    TENFOLD_ISA_CALL(add_segments, nullptr, ids, c.length, nullptr, counts.data());
    const float* const from = data_as<float>(c.x) + i * segments;
    for (int64_t t = 0; t < segments; ++t)
      shares[t] = counts[t] > 0 ? from[t] / static_cast<float>(counts[t]) : 0.0f;
    TENFOLD_ISA_CALL(spread_segments, shares.data(), ids, c.length,
                     data_as<float>(out) + i * c.length);
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("segment_mean", TORCH_BOX(&tenfold::cpu::segment_mean_op));
  m.impl("segment_mean_backward", TORCH_BOX(&tenfold::cpu::segment_mean_backward_op));
}
