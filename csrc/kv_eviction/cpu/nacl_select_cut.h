// SPDX-License-Identifier: Apache-2.0
// The k-th largest of a list of keys, and a guess of it from a sample. For ISA sources.
#pragma once

#include <cmath>

#include "core/cpu/vec.h"
#include "kv_eviction/nacl_select.h"

TENFOLD_ISA_BEGIN
namespace {

// A bisection counts the whole list for every bit.
constexpr int64_t kBisectUpTo = 64;

// All keys above `key`, and the first `ties` of those equal to it, are the wanted ones.
struct Cut {
  uint32_t key;
  int64_t ties;
};

inline int64_t count_from(const uint32_t* keys, int64_t n, uint32_t least) {
  uint32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= least ? 1 : 0;
  return count;
}

inline void range_of(const uint32_t* keys, int64_t n, uint32_t* low, uint32_t* high) {
  uint32_t lo = keys[0], hi = keys[0];
  for (int64_t i = 0; i < n; ++i) {
    lo = keys[i] < lo ? keys[i] : lo;
    hi = keys[i] > hi ? keys[i] : hi;
  }
  *low = lo;
  *high = hi;
}

inline Cut bisect(const uint32_t* keys, int64_t n, int64_t wanted, uint32_t lo, uint32_t hi) {
  while (lo < hi) {
    const uint32_t middle = lo + ((hi - lo) >> 1) + 1;
    const int64_t count = count_from(keys, n, middle);
    if (count < wanted) {
      hi = middle - 1;
      continue;
    }
    lo = middle;
    if (count > wanted) continue;
    for (int64_t i = 0; i < n; ++i) hi = keys[i] >= middle && keys[i] < hi ? keys[i] : hi;
    return {hi, wanted - (hi == UINT32_MAX ? 0 : count_from(keys, n, hi + 1))};
  }
  return {lo, wanted - (lo == UINT32_MAX ? 0 : count_from(keys, n, lo + 1))};
}

// The keys in [first, first + width), in order, to out (which may be where they are); how many.
inline int64_t collect(const uint32_t* keys, int64_t n, uint32_t first, uint32_t width,
                       uint32_t* out) {
  const uint32_t* const begin = out;
  const VI base = seti(first), limit = seti(width);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VI key = load(keys + i);
    out += store_chosen(out, above(limit, key - base), key);
  }
  for (; i < n; ++i)
    if (keys[i] - first < width) *out++ = keys[i];
  return out - begin;
}

// One step: a histogram over the range of the keys, kCopies of it, because increments of one
// counter wait for each other. Moves on to the boundary bin: its lowest key, how many are wanted of
// it, its width.
template <int kBits, int kCopies>
uint32_t boundary_bin(const uint32_t* keys, int64_t n, uint32_t lo, uint32_t hi, int64_t* wanted,
                      uint32_t* width) {
  const int range = 32 - __builtin_clz(hi - lo), shift = range > kBits ? range - kBits : 0;
  uint32_t bins[kCopies][1 << kBits] = {};
  int64_t i = 0;
  for (; i + kCopies <= n; i += kCopies)
    for (int c = 0; c < kCopies; ++c) ++bins[c][(keys[i + c] - lo) >> shift];
  for (; i < n; ++i) ++bins[0][(keys[i] - lo) >> shift];
  for (int c = 1; c < kCopies; ++c)
    for (int bin = 0; bin < 1 << kBits; ++bin) bins[0][bin] += bins[c][bin];
  uint32_t bin = (1u << kBits) - 1;
  while (bins[0][bin] < static_cast<uint64_t>(*wanted)) *wanted -= bins[0][bin--];
  *width = 1u << shift;
  return lo + (bin << shift);
}

// The cut that chooses the `wanted` largest of n keys, 0 < wanted <= n. Its key is one of them.
// boundary [n + kWidth] is working memory.
inline Cut cut_of(const uint32_t* keys, int64_t n, int64_t wanted, uint32_t* boundary) {
  for (;;) {
    uint32_t lo, hi, width;
    range_of(keys, n, &lo, &hi);
    if (lo == hi || n <= kBisectUpTo) return bisect(keys, n, wanted, lo, hi);
    const uint32_t first = n < 4096 ? boundary_bin<8, 2>(keys, n, lo, hi, &wanted, &width)
                                    : boundary_bin<11, 4>(keys, n, lo, hi, &wanted, &width);
    if (width == 1) return {first, wanted};
    n = collect(keys, n, first, width, boundary);
    keys = boundary;
  }
}

// Samples, whole vectors: enough that the margin below is small, few enough to cost little.
constexpr int64_t kLeastSampled = 512;  // shorter rows are not sampled
inline int64_t sample_size(int64_t n) {
  return n < 2048 ? 128 : n < 16384 ? n / 16 / kWidth * kWidth : 1024;
}

// Positions of the samples j, j + 1, .. in a row of n: steps of the golden ratio spread evenly and
// keep no step with anything periodic in the scores.
inline VI sample_at(int64_t j, int64_t n) {
  VI high, low, at;
  mulhilo(seti(static_cast<uint32_t>(j)) + iota(), 0x9E3779B9u, &high, &low);
  mulhilo(low, static_cast<uint32_t>(n), &at, &high);
  return at;
}

// A key that most likely is at or below the `wanted`-th largest of n, from a sample of their keys;
// 0 if none that would exclude much. Three standard deviations: the caller has to check it.
inline uint32_t guess_cut(const uint32_t* sample, int64_t size, int64_t wanted, int64_t n,
                          uint32_t* boundary) {
  const double expected = static_cast<double>(size) * static_cast<double>(wanted) / n;
  const auto rank = static_cast<int64_t>(expected + 3.0 * std::sqrt(expected) + 2.0);
  return rank > size * 3 / 4 ? 0 : cut_of(sample, size, rank, boundary).key;
}

}  // namespace
TENFOLD_ISA_END
