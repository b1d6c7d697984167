// SPDX-License-Identifier: Apache-2.0
// The counting sort of moe_sort, on the CPU: chunks of slots over threads.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/parallel.h"
#include "moe/slots.h"
#include "moe/slots_ops.h"

namespace tenfold::cpu {

constexpr double kMicrosPerSlot = 0.0012;

template <class Int>
class SlotSort {
 public:
  SlotSort(const SortCall& c, int64_t slots_of_chunk)
      : c_(c),
        index_(data_as<Int>(c.index)),
        buckets_(c.experts + 1),
        slots_of_chunk_(slots_of_chunk),
        chunks_(std::max<int64_t>(1, ceil_div(c.slots, slots_of_chunk))),
        next_(chunks_ * buckets_, 0) {}

  void run() {
    std::vector<char> wrong(chunks_, 0);
    over_chunks(sort_micros(), [&](int64_t chunk) { wrong[chunk] = count(chunk) ? 1 : 0; });
    check(std::find(wrong.begin(), wrong.end(), 1) != wrong.end());
    place_all();
  }

  // The same with `before(chunk)`, which writes the chunk's part of the index, all of it right.
  // `micros`: of a chunk.
  template <class F>
  void run_after(double micros, const F& before) {
    over_chunks(micros, [&](int64_t chunk) {
      before(chunk);
      count(chunk);
    });
    place_all();
  }

 private:
  template <class F>
  void over_chunks(double micros, const F& f) const {
    if (chunks_ == 1) return f(0);
    parallel_for(chunks_, micros, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
  double sort_micros() const { return kMicrosPerSlot * static_cast<double>(slots_of_chunk_); }
  void place_all() {
    const int64_t kept = start_experts();
    whole_ = kept == c_.slots;
    std::fill(data_as<int32_t>(c_.order) + kept, data_as<int32_t>(c_.order) + c_.slots, -1);
    over_chunks(sort_micros(), [&](int64_t chunk) { place(chunk); });
  }
  int64_t first(int64_t chunk) const { return chunk * slots_of_chunk_; }
  int64_t last(int64_t chunk) const { return std::min(first(chunk + 1), c_.slots); }

  // The last bucket is of those left out. Whether there is a negative one.
  bool count(int64_t chunk) {
    int32_t* const found = &next_[chunk * buckets_];
    const auto most = static_cast<std::make_unsigned_t<Int>>(c_.experts);
    Int signs = 0;
    for (int64_t q = first(chunk); q < last(chunk); ++q) {
      signs |= index_[q];
      ++found[std::min(static_cast<std::make_unsigned_t<Int>>(index_[q]), most)];
    }
    return signs < 0;
  }

  void check(bool negative) const {
    bool beyond = false;
    for (int64_t i = 0; i < chunks_ && !c_.allow_sentinel; ++i)
      beyond |= next_[i * buckets_ + c_.experts] > 0;
    if (!negative && !beyond) [[likely]]
      return;
    const Int* const at = std::find_if(index_, index_ + c_.slots, [&](Int e) {
      return e < 0 || (e >= c_.experts && !c_.allow_sentinel);
    });
    raise(ErrorKind::index, "tenfold::moe_sort: index must be in [0, ", c_.experts, ")",
          c_.allow_sentinel ? " or beyond it" : " (or beyond it with allow_sentinel=True)",
          ", got ", *at, " at position ", at - index_);
  }

  // Counts of chunks become the positions of their first slots. How many slots have an expert.
  int64_t start_experts() {
    auto *const counts = data_as<int32_t>(c_.counts), *const offsets = data_as<int32_t>(c_.offsets);
    int32_t at = 0;
    for (int64_t e = 0; e < c_.experts; ++e) {
      offsets[e] = at;
      for (int64_t i = 0; i < chunks_; ++i) {
        int32_t& next = next_[i * buckets_ + e];
        at += std::exchange(next, at);
      }
      counts[e] = at - offsets[e];
    }
    offsets[c_.experts] = at;
    return at;
  }

  // Four slots at a time: a place that is read after the one before it was written waits for that
  // one, and so would every slot for the slot before.
  void place(int64_t chunk) {
    int32_t* const next = &next_[chunk * buckets_];
    auto *const order = data_as<int32_t>(c_.order), *const inverse = data_as<int32_t>(c_.inverse);
    int64_t q = first(chunk);
    const int64_t end = last(chunk);
    for (; q + 4 <= end && whole_; q += 4) {
      const Int a = index_[q], b = index_[q + 1], c = index_[q + 2], d = index_[q + 3];
      const int32_t at_a = next[a], at_b = next[b] + (a == b), at_c = next[c] + (a == c) + (b == c);
      const int32_t at_d = next[d] + (a == d) + (b == d) + (c == d);
      next[a] = at_a + 1, next[b] = at_b + 1, next[c] = at_c + 1, next[d] = at_d + 1;
      const int32_t at[] = {at_a, at_b, at_c, at_d};
      for (int i = 0; i < 4; ++i) {
        order[at[i]] = static_cast<int32_t>(q + i);
        inverse[q + i] = at[i];
      }
    }
    for (; q < end; ++q) {
      const Int e = index_[q];
      if (e >= c_.experts) [[unlikely]] {
        inverse[q] = -1;
        continue;
      }
      const int32_t p = next[e]++;
      order[p] = static_cast<int32_t>(q);
      inverse[q] = p;
    }
  }

  const SortCall& c_;
  const Int* index_;
  int64_t buckets_, slots_of_chunk_, chunks_;
  std::vector<int32_t> next_;
  bool whole_ = true;  // every slot has an expert
};

}  // namespace tenfold::cpu
