// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/vec.h"
#include "loss/cpu/segment_runs.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kMost = 64;  // vectors that are summed in float32

template <class Int>
void inside(const Int* seg, int64_t n, int32_t limit, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const Int s = seg[i];
    out[i] = (s >= 0) & (s < limit) ? static_cast<int32_t>(s) : -1;
  }
}

inline VI load_ids(const int32_t* p) {
  return load(reinterpret_cast<const uint32_t*>(p));
}

// How many whole vectors from i on hold `id` only.
inline int64_t whole_vectors(const int32_t* seg, int64_t i, int64_t n, int32_t id) {
  constexpr uint32_t kAll = (1u << kWidth) - 1u;
  const VI same = seti(static_cast<uint32_t>(id));
  int64_t count = 0;
  while (i + kWidth <= n && bits_of(eq(load_ids(seg + i), same)) == kAll) ++count, i += kWidth;
  return count;
}

}  // namespace

void segments_inside(const void* seg, bool wide, int64_t n, int32_t limit, int32_t* out) {
  if (wide) return inside(static_cast<const int64_t*>(seg), n, limit, out);
  inside(static_cast<const int32_t*>(seg), n, limit, out);
}

void add_segments(const float* x, const int32_t* seg, int64_t n, double* sums, int32_t* counts) {
  for (int64_t i = 0; i < n;) {
    const int32_t id = seg[i];
    const int64_t vectors = whole_vectors(seg, i, n, id), end = i + vectors * kWidth;
    if (id < 0) {
      i = vectors > 0 ? end : i + 1;
      continue;
    }
    counts[id] += static_cast<int32_t>(vectors > 0 ? end - i : 1);
    if (x == nullptr) {
      i = vectors > 0 ? end : i + 1;
      continue;
    }
    if (vectors == 0) {
      sums[id] += static_cast<double>(x[i++]);
      continue;
    }
    while (i < end) {
      const int64_t stop = end - i < kMost * kWidth ? end : i + kMost * kWidth;
      VF sum = set1(0.0f);
      for (; i < stop; i += kWidth) sum = sum + load(x + i);
      sums[id] += static_cast<double>(hsum(sum));
    }
  }
}

void spread_segments(const float* values, const int32_t* seg, int64_t n, float* out) {
  for (int64_t i = 0; i < n;) {
    const int32_t id = seg[i];
    const float value = id >= 0 ? values[id] : 0.0f;
    const int64_t end = i + whole_vectors(seg, i, n, id) * kWidth;
    if (i == end) {
      out[i++] = value;
      continue;
    }
    const VF all = set1(value);
    for (; i < end; i += kWidth) store(out + i, all);
  }
}

TENFOLD_ISA_END
