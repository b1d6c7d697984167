// Macro actions (MA-RLHF section 3.3): rows of valid tokens cut into segments.
//
//   seg[b, j]  = number of the segment of token j, from 0; -1 where mask[b, j] == 0
//   nseg[b]    = segments of row b
//
// Valid tokens are numbered q = 0, 1, ... across holes of the mask. The first one always begins a
// segment; which others do is what the four ops differ in.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

enum class SegmentBy : int { fixed, lengths, macro_prefix, response_prefix, token_rise, token_rise_ref, starts };

struct SegmentParams {
  const uint8_t* mask;  // [rows, width]
  int64_t rows, width, mask_stride;
  SegmentBy by;
  bool isolate_last;     // the last valid token is a segment of its own
  bool split;            // a hole of the mask ends a segment
  bool recycle;          // lengths begin anew where they end; else the rest is one segment
  int64_t n;             // fixed
  const int32_t* lengths;  // [rows, num_lengths]
  int64_t num_lengths;
  const float* nll;       // [rows, width], contiguous
  const uint8_t* starts;  // [rows, width]
  int64_t starts_stride;
  int32_t* seg;   // [rows, width]
  int32_t* nseg;  // [rows]
};

// Walks over the valid tokens of one row in order and says which begin a segment.
class SegmentWalk {
 public:
  // `count`: valid tokens of the row.
  TENFOLD_HD_MEMBER SegmentWalk(const SegmentParams& p, int64_t row, int64_t count)
      : p_(p), row_(row), count_(count) {
    if (p.by == SegmentBy::lengths && p.num_lengths > 0) end_ = p.lengths[row * p.num_lengths];
  }

  // Token j is the next valid one; `after_hole`: the one before it in memory is not.
  // `next`: the valid token after it (j itself for the last one); only token_rise_ref asks.
  TENFOLD_HD_MEMBER bool begins(int64_t j, int64_t next, bool after_hole) {
    bool begin = q_ == 0 || (p_.split && after_hole);
    const bool last = q_ == count_ - 1;
    if (p_.by == SegmentBy::fixed) begin |= q_ % p_.n == 0 && !(p_.isolate_last && last);
    if (p_.by == SegmentBy::lengths) begin |= at_end_of_length() && !(p_.isolate_last && last);
    if (p_.by == SegmentBy::starts) begin |= p_.starts[row_ * p_.starts_stride + j] != 0;
    if (p_.nll != nullptr) begin |= by_perplexity(p_.nll[row_ * p_.width + j], p_.nll[row_ * p_.width + next], last, begin);
    begin |= p_.isolate_last && last;
    ++q_;
    return begin;
  }

 private:
  TENFOLD_HD_MEMBER bool at_end_of_length() {
    if (q_ != end_) return false;
    if (++length_ == p_.num_lengths) {
      if (!p_.recycle) {
        end_ = -1;
        return p_.num_lengths > 0;
      }
      length_ = 0;
    }
    end_ += p_.lengths[row_ * p_.num_lengths + length_];
    return true;
  }

  TENFOLD_HD_MEMBER bool by_perplexity(float u, float next, bool last, bool already) {
    bool begin = false;
    switch (p_.by) {
      case SegmentBy::token_rise: begin = q_ > 0 && u > before_; break;
      case SegmentBy::token_rise_ref: begin = last || next > u; break;
      case SegmentBy::response_prefix:  // the mean of q + 1 tokens is above that of q
        begin = q_ > 0 && static_cast<double>(u) * static_cast<double>(q_) > total_;
        total_ += u;
        break;
      default:  // macro_prefix
        begin = held_ > 0 && static_cast<double>(u) * static_cast<double>(held_) > total_;
        if (begin || already) total_ = 0.0, held_ = 0;
        total_ += u;
        ++held_;
    }
    before_ = u;
    return begin;
  }

  const SegmentParams& p_;
  int64_t row_, count_;
  int64_t q_ = 0;
  int64_t length_ = 0, end_ = -1;  // lengths: which one, and where it ends
  double total_ = 0.0;
  int64_t held_ = 0;
  float before_ = 0.0f;
};

}  // namespace tenfold
