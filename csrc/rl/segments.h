// SPDX-License-Identifier: Apache-2.0
// Macro actions (MA-RLHF section 3.3): rows of valid tokens cut into segments.
//
//   seg[b, j]  = number of the segment of token j, from 0; -1 where mask[b, j] == 0
//   nseg[b]    = segments of row b
//
// Valid tokens are numbered q = 0, 1, ... across holes of the mask. The first one always begins a
// segment; which others do is what the four ops differ in.
#pragma once

#include <cstdint>

#include "rl/rows.h"

namespace tenfold {

enum class SegmentBy : int {
  fixed,
  lengths,
  macro_prefix,
  response_prefix,
  token_rise,
  token_rise_ref,
  starts
};

struct SegmentParams {
  Rows rows;
  const uint8_t* mask;
  int64_t mask_stride;  // of padded rows
  SegmentBy by;
  bool isolate_last;       // the last valid token is a segment of its own
  bool split;              // a hole of the mask ends a segment
  bool recycle;            // lengths begin anew where they end; else the rest is one segment
  int64_t n;               // fixed
  const int32_t* lengths;  // [rows, num_lengths]
  int64_t num_lengths;
  const float* nll;       // as the mask, contiguous
  const uint8_t* starts;  // as the mask
  int64_t starts_stride;
  int32_t* seg;   // as the mask
  int32_t* nseg;  // [rows]

  TENFOLD_HD_MEMBER const uint8_t* mask_row(int64_t b) const { return at(mask, mask_stride, b); }
  TENFOLD_HD_MEMBER const uint8_t* starts_row(int64_t b) const {
    return at(starts, starts_stride, b);
  }

 private:
  TENFOLD_HD_MEMBER const uint8_t* at(const uint8_t* p, int64_t stride, int64_t b) const {
    return p + (rows.offsets.data == nullptr ? b * stride : rows[b].begin);
  }
};

// macro_prefix, token by token: one begins a segment if it is above the mean of the running one.
struct RunningMean {
  double total = 0.0;
  int64_t held = 0;

  // `already`: it does so in any case.
  TENFOLD_HD_MEMBER bool begins(float u, bool already) {
    const bool begin = held > 0 && static_cast<double>(u) * static_cast<double>(held) > total;
    if (begin || already) total = 0.0, held = 0;
    total += u;
    ++held;
    return begin;
  }
};

}  // namespace tenfold
