// SPDX-License-Identifier: Apache-2.0
// The valid tokens of a row, one after the other, for the CPU registrations of the family.
#pragma once

#include <vector>

#include "core/parallel.h"
#include "rl/cpu/row_kernels.h"
#include "rl/rows_ops.h"

namespace tenfold::cpu {

// What a thread reuses from row to row. Where valid tokens are not the first ones of their row,
// they are copied together on the way in and apart on the way out.
class ValidTokens {
 public:
  explicit ValidTokens(int64_t longest) : longest_(longest) {}

  void read(const SegmentRow& row, int64_t width) {
    width_ = width;
    if (!row.ids.wide) {
      segments_ = static_cast<const int32_t*>(row.ids.data);
      count_ = TENFOLD_ISA_CALL(count_valid, segments_, width, row.limit);
      // If so many tokens come first and are consecutive below the limit, they are the valid ones.
      consecutive_ = TENFOLD_ISA_CALL(is_consecutive, segments_, count_);
      first_ = consecutive_ = consecutive_ && (count_ == 0 || segments_[count_ - 1] < row.limit);
      if (first_) return;
    }
    gather(width, [&](int64_t j) { return row[j]; });
    segments_ = seg_.data();
    consecutive_ = TENFOLD_ISA_CALL(is_consecutive, segments_, count_);
  }

  void read_mask(const uint8_t* mask, int64_t width) {
    width_ = width, segments_ = nullptr;
    count_ = TENFOLD_ISA_CALL(count_marked, mask, width);
    first_ = TENFOLD_ISA_CALL(count_marked, mask, count_) == count_;
    if (first_) return;
    gather(width, [&](int64_t j) { return mask[j] != 0 ? 0 : -1; });
  }

  int64_t width() const { return width_; }
  int64_t count() const { return count_; }
  const int32_t* segments() const { return segments_; }
  // The segments are 0, 1, ... one after the other.
  bool consecutive() const { return consecutive_; }

  // The values x of the valid tokens.
  template <class T>
  const T* pick(const T* x, std::vector<T>* memory) const {
    if (first_) return x;
    memory->resize(count_);
    for (int64_t q = 0; q < count_; ++q) (*memory)[q] = x[column_[q]];
    return memory->data();
  }

  // Where to write values of the valid tokens, before `place`.
  template <class T>
  T* target(T* out, std::vector<T>* memory) const {
    if (first_) return out;
    memory->resize(count_);
    return memory->data();
  }
  // `made`: what `target` gave. Masked tokens get 0.
  template <class T>
  void place(const T* made, T* out) const {
    if (first_) {
      std::fill(out + count_, out + width_, T{0});
      return;
    }
    std::fill(out, out + width_, T{0});
    for (int64_t q = 0; q < count_; ++q) out[column_[q]] = made[q];
  }

 private:
  template <class F>
  void gather(int64_t width, const F& segment) {
    seg_.resize(longest_), column_.resize(longest_);
    count_ = 0;
    for (int64_t j = 0; j < width; ++j) {
      const int32_t s = segment(j);
      seg_[count_] = s, column_[count_] = static_cast<int32_t>(j);
      count_ += s >= 0;
    }
    first_ = count_ == 0 || column_[count_ - 1] == count_ - 1;
  }

  int64_t longest_;
  std::vector<int32_t> seg_, column_;
  const int32_t* segments_ = nullptr;
  int64_t width_ = 0, count_ = 0;
  bool first_ = true, consecutive_ = false;
};

// All masked tokens of a row are -1.
inline bool is_minus_one(const Ints& ids, int64_t width, int64_t valid) {
  int64_t found = 0;
  if (ids.wide) {
    for (int64_t j = 0; j < width; ++j) found += ids[j] == -1;
  } else {
    const auto* seg = static_cast<const int32_t*>(ids.data);
    found = TENFOLD_ISA_CALL(count_equal, seg, width, -1);
  }
  return found == width - valid;
}

// How many segments a row has if they are 0, 1, ... one after the other, and -1 elsewhere; else -1.
inline int64_t numbered_segments(const Ints& ids, int64_t width, ValidTokens* tokens) {
  tokens->read({ids, INT32_MAX}, width);
  const int64_t count = tokens->count();
  if (count < width && !is_minus_one(ids, width, count)) return -1;
  if (!tokens->consecutive()) return -1;
  return count > 0 ? tokens->segments()[count - 1] + 1 : 0;
}

// f(b, span, tokens) for every row.
template <class F>
void over_rows(const SegmentRows& seg, double micros_per_token, const F& f) {
  parallel_for(seg.rows.count, micros_per_token * static_cast<double>(seg.rows.width + 16),
               [&](int64_t begin, int64_t end) {
                 ValidTokens tokens(seg.rows.width);
                 for (int64_t b = begin; b < end; ++b) {
                   const Span span = seg.rows[b];
                   tokens.read(seg[b], span.width);
                   f(b, span, tokens);
                 }
               });
}

}  // namespace tenfold::cpu
