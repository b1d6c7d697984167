// SPDX-License-Identifier: Apache-2.0
// Working memory in parts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "core/scratch.h"

namespace tenfold {

// One allocation in parts of some floats each (rounded to cache lines).
class Floats {
 public:
  explicit Floats(std::initializer_list<int64_t> sizes) : memory_(4 * total(sizes)) {
    auto* at = static_cast<float*>(memory_.data());
    parts_.reserve(sizes.size());
    for (const int64_t n : sizes) {
      parts_.push_back(at);
      at += whole_lines(n);
    }
  }
  float* operator[](size_t i) const { return parts_[i]; }

 private:
  static int64_t whole_lines(int64_t n) { return (n + 15) / 16 * 16; }
  static int64_t total(std::initializer_list<int64_t> sizes) {
    int64_t sum = 16;
    for (const int64_t n : sizes) sum += whole_lines(n);
    return sum;
  }
  Scratch memory_;
  std::vector<float*> parts_;
};

}  // namespace tenfold
