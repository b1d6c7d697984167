// SPDX-License-Identifier: Apache-2.0
// CPU registration of segment_mean and its backward: a row a task.
#include "loss/segment_mean.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "loss/cpu/segment_runs.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerToken = 4e-4;

// What a thread reuses from row to row.
struct RowMemory {
  std::vector<int32_t> ids, counts;  // ids: -1 where a token is not read
  std::vector<double> sums;
  std::vector<float> shares;

  explicit RowMemory(const SegmentMeanCall& c)
      : ids(c.length), counts(c.segments), sums(c.segments), shares(c.segments) {}
};

// f(row, memory) for all rows; ids are there, counts and sums are 0.
template <class F>
void over_rows(const SegmentMeanCall& c, const F& f) {
  const int64_t size = c.seg.scalar_type() == ScalarType::Long ? 8 : 4;
  const auto* const seg = static_cast<const char*>(c.seg.data_ptr());
  parallel_for(c.rows, kMicrosPerToken * static_cast<double>(c.length + 2 * c.segments),
               [&](int64_t begin, int64_t end) {
                 RowMemory m(c);
                 for (int64_t i = begin; i < end; ++i) {
                   TENFOLD_ISA_CALL(segments_inside, seg + i * c.length * size, size == 8, c.length,
                                    static_cast<int32_t>(c.segments), m.ids.data());
                   std::fill(m.counts.begin(), m.counts.end(), 0);
                   std::fill(m.sums.begin(), m.sums.end(), 0.0);
                   f(i, m);
                 }
               });
}

Tensor segment_mean_op(Tensor nll, Tensor seg, int64_t segments) {
  const SegmentMeanCall c = check_segment_mean("segment_mean", "nll", false, nll, seg, segments);
  const Tensor out = new_output(c.x, {c.rows, segments}, ScalarType::Float);
  const auto* const from = data_as<float>(c.x);
  auto* const to = data_as<float>(out);
  over_rows(c, [&](int64_t i, RowMemory& m) {
    TENFOLD_ISA_CALL(add_segments, from + i * c.length, m.ids.data(), c.length, m.sums.data(),
                     m.counts.data());
    for (int64_t t = 0; t < segments; ++t)
      to[i * segments + t] = m.counts[t] > 0 ? static_cast<float>(m.sums[t] / m.counts[t]) : 0.0f;
  });
  return out;
}

Tensor segment_mean_backward_op(Tensor grad, Tensor seg, int64_t segments) {
  const SegmentMeanCall c =
      check_segment_mean("segment_mean_backward", "grad", true, grad, seg, segments);
  const Tensor out = new_output(c.x, {c.rows, c.length}, ScalarType::Float);
  const auto* const from = data_as<float>(c.x);
  auto* const to = data_as<float>(out);
  over_rows(c, [&](int64_t i, RowMemory& m) {
    TENFOLD_ISA_CALL(add_segments, nullptr, m.ids.data(), c.length, nullptr, m.counts.data());
    for (int64_t t = 0; t < segments; ++t)
      m.shares[t] =
          m.counts[t] > 0 ? from[i * segments + t] / static_cast<float>(m.counts[t]) : 0.0f;
    TENFOLD_ISA_CALL(spread_segments, m.shares.data(), m.ids.data(), c.length, to + i * c.length);
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("segment_mean", TORCH_BOX(&tenfold::cpu::segment_mean_op));
  m.impl("segment_mean_backward", TORCH_BOX(&tenfold::cpu::segment_mean_backward_op));
}
