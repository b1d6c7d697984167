// SPDX-License-Identifier: Apache-2.0
// t5_attention: softmax attention with the relative position bias of T5 (ERNIE-Code, arXiv
// 2212.06742), which is computed from its table inside and never stored as a matrix.
//
//   r = j - (q_offset + i)
//   logit_ij = scale * q_i . k_j + table[bucket(r)][h];  out_i = sum_j softmax_j(logit_ij) v_j
//   row i sees the keys j < kv_len, and where causal those with r <= 0
//
// A bucket is a range of distances |r|, for each direction: table[bucket(r)] is constant beyond the
// last threshold, so that one row of the table per distance within `reach` says everything. The
// kernels are those of dha_attention, with kmap and vmap the identity.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace tenfold {

constexpr int kMostBuckets = 256;

// Which bucket a distance falls into. Buckets of one direction: [0, exact) hold one distance each,
// bucket exact + i the distances from starts[i] on.
struct RelativeBuckets {
  int32_t count, half, exact;  // rows of the table; buckets of a direction
  bool bidirectional;
  int32_t starts[kMostBuckets / 2 + 1];  // [half - exact], ascending
};

// Distances beyond it are in the last bucket of their direction.
TENFOLD_HD int32_t bucket_reach(const RelativeBuckets& b) {
  return b.starts[b.half - b.exact - 1];
}

TENFOLD_HD int32_t bucket_of(const RelativeBuckets& b, int64_t r) {
  const int64_t n = r < 0 ? -r : b.bidirectional ? r : 0;
  const int32_t direction = b.bidirectional && r > 0 ? b.half : 0;
  if (n < b.exact) return direction + static_cast<int32_t>(n);
  int32_t i = b.half - b.exact - 1;
  while (i > 0 && n < b.starts[i]) --i;
  return direction + b.exact + i;
}

struct RelativeRange {
  int64_t first, last;  // [first, last)
};

// The relative positions of a bucket among those of [-most, most].
TENFOLD_HD RelativeRange bucket_range(const RelativeBuckets& b, int32_t bucket, int64_t most) {
  const bool ahead = b.bidirectional && bucket >= b.half;
  const int32_t i = bucket - (ahead ? b.half : 0);
  if (i >= b.half) return {0, 0};  // the odd row of a table
  const int64_t from = i < b.exact ? i : b.starts[i - b.exact];
  int64_t to = i + 1 < b.exact ? i + 1 : i + 1 == b.half ? most + 1 : b.starts[i + 1 - b.exact];
  if (to > most + 1) to = most + 1;
  if (from >= to) return {0, 0};
  if (ahead) return {from > 0 ? from : 1, to};
  return {1 - to, i == 0 && !b.bidirectional ? most + 1 : 1 - from};
}

// The bucket of a distance n >= exact as T5 computes it, in float32: that decides which distance is
// the first of a bucket.
inline int64_t grown_bucket(int64_t n, int64_t half, int64_t exact, int64_t max_distance) {
  const float range =
      static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(exact)));
  const float grown = std::log(static_cast<float>(n) / static_cast<float>(exact)) / range *
                      static_cast<float>(half - exact);
  const int64_t bucket = exact + static_cast<int64_t>(grown);
  return bucket < half ? bucket : half - 1;
}

inline RelativeBuckets relative_buckets(int64_t count, bool bidirectional, int64_t max_distance) {
  RelativeBuckets b{};
  b.count = static_cast<int32_t>(count), b.bidirectional = bidirectional;
  b.half = static_cast<int32_t>(bidirectional ? count / 2 : count), b.exact = b.half / 2;
  b.starts[0] = b.exact;
  for (int32_t i = 1; i < b.half - b.exact; ++i) {
    int64_t low = b.starts[i - 1], high = max_distance;  // the first distance lies in [low, high]
    while (low < high) {
      const int64_t n = (low + high) / 2;
      if (grown_bucket(n, b.half, b.exact, max_distance) >= b.exact + i) {
        high = n;
      } else {
        low = n + 1;
      }
    }
    b.starts[i] = static_cast<int32_t>(low);
  }
  return b;
}

}  // namespace tenfold
