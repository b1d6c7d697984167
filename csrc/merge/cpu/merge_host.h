// SPDX-License-Identifier: Apache-2.0
// What the CPU registrations of the merge operations share.
#pragma once

#include <algorithm>

#include "core/parallel.h"
#include "merge/merge_ops.h"

namespace tenfold::cpu {

constexpr int64_t kMergePart = 1 << 15;  // elements of a task, a multiple of a block of draws

// Calls f(begin, end) for the parts of n elements.
template <class F>
void for_each_part(int64_t n, int64_t part, double micros, const F& f) {
  parallel_for((n + part - 1) / part, micros, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * part, i * part + part < n ? i * part + part : n);
  });
}

// Whether a result of so many bytes is written past the caches, which would not hold it anyway and
// would first read what it overwrites. Not over an input: that is in the caches.
inline bool past_caches(const void* out, int64_t bytes, const void* const* inputs, int count) {
  constexpr int64_t kFrom = int64_t{8} << 20;
  return bytes >= kFrom && std::find(inputs, inputs + count, out) == inputs + count;
}

inline bool leaves_caches(const DeltaMerge& m, int64_t n) {
  return m.out != m.base && past_caches(m.out, n * dtype_size(m.dtype), m.expert, m.experts);
}

// Keeps the largest kept[e] elements of each expert.
void run_ties_merge(DeltaMerge m, int64_t n, const std::vector<int64_t>& kept);
// A merge without cuts.
void run_delta_merge(DeltaMerge m, int64_t n);
void run_weighted_sum(WeightedSum m, int64_t n);

// Adds to the upper triangle and mirrors it.
void add_gram(const GramInput& in, int64_t n, double* gram);

}  // namespace tenfold::cpu
