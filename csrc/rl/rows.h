// SPDX-License-Identifier: Apache-2.0
// Where the rows of a batch lie: padded as [B, R], or packed one after the other as [N] with
// offsets (cu_seqlens) [B + 1].
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace tenfold {

struct Span {
  int64_t begin, width;
};

// An int32 or int64 array.
struct Ints {
  const void* data;
  bool wide;

  TENFOLD_HD_MEMBER int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  TENFOLD_HD_MEMBER Ints from(int64_t i) const {
    return {static_cast<const char*>(data) + i * (wide ? 8 : 4), wide};
  }
};

struct Rows {
  // width: R; of packed rows, what none exceeds. total: B R or N.
  int64_t count, width, total;
  Ints offsets;  // null: padded

  // Offsets that a CUDA kernel cannot check in advance are forced into [0, N]: memory-safe.
  TENFOLD_HD_MEMBER Span operator[](int64_t b) const {
    if (offsets.data == nullptr) return {b * width, width};
    const int64_t begin = inside(offsets[b], 0);
    return {begin, inside(offsets[b + 1], begin) - begin};
  }

 private:
  TENFOLD_HD_MEMBER int64_t inside(int64_t x, int64_t least) const {
    return x < least ? least : x > total ? total : x;
  }
};

// The segments of a row's tokens. A token whose segment is outside [0, limit) is masked.
struct SegmentRow {
  Ints ids;
  int64_t limit;

  TENFOLD_HD_MEMBER int32_t operator[](int64_t j) const {
    const int64_t s = ids[j];
    return s >= 0 && s < limit ? static_cast<int32_t>(s) : -1;
  }
};

// Segments of a batch, and how many of a row count: those below its width, and `most`.
struct SegmentRows {
  Rows rows;
  Ints ids;
  int64_t most = INT32_MAX;

  TENFOLD_HD_MEMBER SegmentRow operator[](int64_t b) const {
    const Span span = rows[b];
    return {ids.from(span.begin), span.width < most ? span.width : most};
  }
};

// nseg[b], inside [0, most].
TENFOLD_HD int64_t count_at(const Ints& nseg, int64_t b, int64_t most) {
  const int64_t n = nseg[b];
  return n < 0 ? 0 : n > most ? most : n;
}

}  // namespace tenfold
