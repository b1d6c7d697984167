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
template <SegmentBy kBy>
class SegmentWalk {
 public:
  static constexpr bool kLooksAhead = kBy == SegmentBy::token_rise_ref;

  // `count`: valid tokens of the row.
  SegmentWalk(const SegmentParams& p, int64_t row, int64_t count)
      : n_(p.n),
        nll_(p.nll + (p.nll != nullptr ? p.rows[row].begin : 0)),
        starts_(p.starts != nullptr ? p.starts_row(row) : nullptr),
        lengths_(p.lengths + row * p.num_lengths),
        num_lengths_(p.num_lengths),
        last_(count - 1),
        split_(p.split),
        isolate_last_(p.isolate_last),
        recycle_(p.recycle) {
    if (kBy == SegmentBy::lengths && num_lengths_ > 0) end_ = lengths_[0];
  }

  // Token j is the next valid one; `after_hole`: the one before it in memory is not.
  // `next`: the valid token after it (j itself for the last one); only kLooksAhead asks.
  bool begins(int64_t j, int64_t next, bool after_hole) {
    const bool last = q_ == last_, alone = isolate_last_ && last;
    bool begin = q_ == 0 || (split_ && after_hole);
    if constexpr (kBy == SegmentBy::fixed) {
      begin |= in_segment_ == 0 && !alone;
      if (++in_segment_ == n_) in_segment_ = 0;
    } else if constexpr (kBy == SegmentBy::lengths) {
      begin |= at_end_of_length() && !alone;
    } else if constexpr (kBy == SegmentBy::starts) {
      begin |= starts_[j] != 0;
    } else {
      begin |= by_perplexity(nll_[j], nll_[next], last, begin);
    }
    ++q_;
    return begin || alone;
  }

 private:
  bool at_end_of_length() {
    if (q_ != end_) return false;
    if (++length_ == num_lengths_) {
      if (!recycle_) {
        end_ = -1;
        return num_lengths_ > 0;
      }
      length_ = 0;
    }
    end_ += lengths_[length_];
    return true;
  }

  bool by_perplexity(float u, float next, bool last, bool already) {
    bool begin = false;
    if constexpr (kBy == SegmentBy::token_rise) {
      begin = q_ > 0 && u > before_;
      before_ = u;
    } else if constexpr (kBy == SegmentBy::token_rise_ref) {
      begin = last || next > u;
    } else if constexpr (kBy == SegmentBy::response_prefix) {
      // The mean of q + 1 tokens is above that of q.
      begin = q_ > 0 && static_cast<double>(u) * static_cast<double>(q_) > total_;
      total_ += u;
    } else {
      begin = mean_.begins(u, already);
    }
    return begin;
  }

  const int64_t n_;
  const float* const nll_;
  const uint8_t* const starts_;
  const int32_t* const lengths_;
  const int64_t num_lengths_, last_;
  const bool split_, isolate_last_, recycle_;
  int64_t q_ = 0, in_segment_ = 0;
  int64_t length_ = 0, end_ = -1;  // lengths: which one, and where it ends
  double total_ = 0.0;
  RunningMean mean_;
  float before_ = 0.0f;
};

template <SegmentBy kBy>
void segment_row(const SegmentParams& p, int64_t row) {
  const Span span = p.rows[row];
  const int64_t width = span.width;
  const uint8_t* const mask = p.mask_row(row);
  int32_t* const seg = p.seg + span.begin;
  int64_t count = 0;
  for (int64_t j = 0; j < width; ++j) count += mask[j] != 0;
  SegmentWalk<kBy> walk(p, row, count);
  int32_t segments = 0;
  bool hole = false;  // between the valid token before and this one
  for (int64_t j = 0; j < width; ++j) {
    if (mask[j] == 0) {
      seg[j] = -1;
      hole = true;
      continue;
    }
    int64_t next = j;
    if constexpr (SegmentWalk<kBy>::kLooksAhead) {
      for (++next; next < width && mask[next] == 0;) ++next;
      if (next == width) next = j;
    }
    segments += walk.begins(j, next, hole);
    seg[j] = segments - 1;
    hole = false;
  }
  p.nseg[row] = segments;
}

template <SegmentBy kBy>
void segment_rows(const SegmentParams& p) {
  parallel_for(p.rows.count, kMicrosPerToken * static_cast<double>(p.rows.width),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) segment_row<kBy>(p, row);
               });
}

std::tuple<Tensor, Tensor> run(const Tensor& mask, const SegmentArgs& a) {
  const SegmentCall call = check_segments(mask, a);
  check_lengths(a.op, call.p);
  switch (call.p.by) {
    case SegmentBy::fixed: segment_rows<SegmentBy::fixed>(call.p); break;
    case SegmentBy::lengths: segment_rows<SegmentBy::lengths>(call.p); break;
    case SegmentBy::macro_prefix: segment_rows<SegmentBy::macro_prefix>(call.p); break;
    case SegmentBy::response_prefix: segment_rows<SegmentBy::response_prefix>(call.p); break;
    case SegmentBy::token_rise: segment_rows<SegmentBy::token_rise>(call.p); break;
    case SegmentBy::token_rise_ref: segment_rows<SegmentBy::token_rise_ref>(call.p); break;
    case SegmentBy::starts: segment_rows<SegmentBy::starts>(call.p); break;
  }
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
