// SPDX-License-Identifier: Apache-2.0
// A list of tensors as one list of chunks of equal length, for parallel_for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace tenfold::cpu {

// Elements of a chunk: a few microseconds of work, a multiple of 64, so that no two chunks of a
// tensor share a byte of its mask.
constexpr int64_t kChunk = int64_t{1} << 15;

class Chunks {
 public:
  struct Part {
    size_t tensor;
    int64_t begin, end;  // elements
  };

  template <class Tensors>
  explicit Chunks(const Tensors& tensors) {
    first_.push_back(0);
    for (const auto& t : tensors) {
      numel_.push_back(t.numel());
      first_.push_back(first_.back() + (t.numel() + kChunk - 1) / kChunk);
    }
  }

  int64_t size() const { return first_.back(); }

  Part operator[](int64_t chunk) const {
    const auto next = std::upper_bound(first_.begin(), first_.end(), chunk);
    const auto tensor = static_cast<size_t>(next - first_.begin()) - 1;
    const int64_t begin = (chunk - first_[tensor]) * kChunk;
    return {tensor, begin, std::min(begin + kChunk, numel_[tensor])};
  }

  // A step through all chunks that visits distant ones in turn: what a mask freezes often lies
  // together, and each thread takes one part of the list.
  int64_t stride(bool masked) const {
    const int64_t n = size();
    if (!masked || n < 4) return 1;
    auto step = static_cast<int64_t>(static_cast<double>(n) * 0.6180339887498949) | 1;
    while (std::gcd(step, n) != 1) step += 2;
    return step;
  }

 private:
  std::vector<int64_t> first_, numel_;
};

}  // namespace tenfold::cpu
