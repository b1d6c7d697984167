// SPDX-License-Identifier: Apache-2.0
#include "core/overlap.h"

#include <algorithm>
#include <iterator>
#include <numeric>

namespace tenfold {

// By begin. Digit by digit: comparing thousands of tensors costs more than updating small ones.
void Memory::sort() {
  constexpr int kBits = 11;
  constexpr size_t kFewest = 64;
  const auto less = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (spans_.size() < kFewest) return std::sort(spans_.begin(), spans_.end(), less);
  const auto [low, high] = std::minmax_element(spans_.begin(), spans_.end(), less);
  const uintptr_t from = low->begin, range = high->begin - from;
  std::vector<Span> other(spans_.size());
  for (int shift = 0; shift < 64 && (range >> shift) != 0; shift += kBits) {
    const auto digit = [&](const Span& s) {
      return ((s.begin - from) >> shift) & ((1u << kBits) - 1);
    };
    size_t at[(1 << kBits) + 1] = {};
    for (const Span& s : spans_) ++at[digit(s) + 1];
    std::partial_sum(std::begin(at), std::end(at), std::begin(at));
    for (const Span& s : spans_) other[at[digit(s)]++] = s;
    spans_.swap(other);
  }
}

void Memory::check(const char* op) {
  sort();
  const Span* any = nullptr;      // reaches furthest of all so far
  const Span* written = nullptr;  // and of those that are written
  for (const Span& s : spans_) {
    const Span* other = s.written ? any : written;
    if (other != nullptr && other->end > s.begin) [[unlikely]] {
      raise(ErrorKind::value, "tenfold::", op, ": ", other->name, "[", other->index, "] and ",
            s.name, "[", s.index, "] must not share memory: ",
            s.written && other->written ? "both are" : "one of them is", " written");
    }
    if (any == nullptr || s.end > any->end) any = &s;
    if (s.written && (written == nullptr || s.end > written->end)) written = &s;
  }
}

}  // namespace tenfold
