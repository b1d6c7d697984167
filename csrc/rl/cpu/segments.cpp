// SPDX-License-Identifier: Apache-2.0
// CPU registration of the segmentation ops: rows are walked over one by one.
#include "rl/segments.h"

#include <torch/csrc/stable/library.h>

#include "core/parallel.h"
#include "rl/segments_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerToken = 0.003;

void check_lengths(const char* op, const SegmentParams& p) {
  for (int64_t i = 0; i < p.rows.count * p.num_lengths; ++i)
    TENFOLD_CHECK_VALUE(p.lengths[i] >= 1, "tenfold::", op, ": lengths must be at least 1, got ",
                        p.lengths[i], " at [", i / p.num_lengths, ", ", i % p.num_lengths, "]");
}

// Walks over the valid tokens of one row in order and says which begin a segment.
class SegmentWalk {
 public:
  // `count`: valid tokens of the row.
  SegmentWalk(const SegmentParams& p, int64_t row, int64_t count)
      : p_(p),
        nll_(p.nll + (p.nll != nullptr ? p.rows[row].begin : 0)),
        starts_(p.starts != nullptr ? p.starts_row(row) : nullptr),
        lengths_(p.lengths + row * p.num_lengths),
        count_(count) {
    if (p.by == SegmentBy::lengths && p.num_lengths > 0) end_ = lengths_[0];
  }

  // Token j is the next valid one; `after_hole`: the one before it in memory is not.
  // `next`: the valid token after it (j itself for the last one); only token_rise_ref asks.
  bool begins(int64_t j, int64_t next, bool after_hole) {
    bool begin = q_ == 0 || (p_.split && after_hole);
    const bool last = q_ == count_ - 1;
    if (p_.by == SegmentBy::fixed) begin |= q_ % p_.n == 0 && !(p_.isolate_last && last);
    if (p_.by == SegmentBy::lengths) begin |= at_end_of_length() && !(p_.isolate_last && last);
    if (p_.by == SegmentBy::starts) begin |= starts_[j] != 0;
    if (p_.nll != nullptr) begin |= by_perplexity(nll_[j], nll_[next], last, begin);
    begin |= p_.isolate_last && last;
    ++q_;
    return begin;
  }

 private:
  bool at_end_of_length() {
    if (q_ != end_) return false;
    if (++length_ == p_.num_lengths) {
      if (!p_.recycle) {
        end_ = -1;
        return p_.num_lengths > 0;
      }
      length_ = 0;
    }
    end_ += lengths_[length_];
    return true;
  }

  bool by_perplexity(float u, float next, bool last, bool already) {
    bool begin = false;
    switch (p_.by) {
      case SegmentBy::token_rise: begin = q_ > 0 && u > before_; break;
      case SegmentBy::token_rise_ref: begin = last || next > u; break;
      case SegmentBy::response_prefix:  // the mean of q + 1 tokens is above that of q
        begin = q_ > 0 && static_cast<double>(u) * static_cast<double>(q_) > total_;
        total_ += u;
        break;
      default: begin = mean_.begins(u, already);
    }
    before_ = u;
    return begin;
  }

  const SegmentParams& p_;
  const float* nll_;
  const uint8_t* starts_;
  const int32_t* lengths_;
  int64_t count_;
  int64_t q_ = 0;
  int64_t length_ = 0, end_ = -1;  // lengths: which one, and where it ends
  double total_ = 0.0;
  RunningMean mean_;
  float before_ = 0.0f;
};

void segment_row(const SegmentParams& p, int64_t row) {
  const Span span = p.rows[row];
  const int64_t width = span.width;
  const uint8_t* mask = p.mask_row(row);
  int32_t* seg = p.seg + span.begin;
  int64_t count = 0;
  for (int64_t j = 0; j < width; ++j) count += mask[j] != 0;
  SegmentWalk walk(p, row, count);
  int32_t segments = 0;
  int64_t next = 0, before = -1;
  for (int64_t j = 0; j < width; ++j) {
    if (mask[j] == 0) {
      seg[j] = -1;
      continue;
    }
    for (next = j + 1; next < width && mask[next] == 0;) ++next;
    segments += walk.begins(j, next < width ? next : j, before >= 0 && before != j - 1);
    seg[j] = segments - 1;
    before = j;
  }
  p.nseg[row] = segments;
}

std::tuple<Tensor, Tensor> run(const Tensor& mask, const SegmentArgs& a) {
  const SegmentCall call = check_segments(mask, a);
  check_lengths(a.op, call.p);
  parallel_for(call.p.rows.count, kMicrosPerToken * static_cast<double>(call.p.rows.width),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) segment_row(call.p, row);
               });
  return {call.seg, call.nseg};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::SegmentOps<&tenfold::cpu::run>;
  m.impl("macro_segment_fixed", TORCH_BOX(&Ops::fixed));
  m.impl("macro_segment_lengths", TORCH_BOX(&Ops::lengths));
  m.impl("macro_segment_ppl", TORCH_BOX(&Ops::ppl));
  m.impl("macro_segment_starts", TORCH_BOX(&Ops::starts));
}
