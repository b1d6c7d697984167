// SPDX-License-Identifier: Apache-2.0
// Which memory an op with lists of tensors writes: two of its tensors must not share any of it.
#pragma once

#include <cstdint>
#include <vector>

#include "core/check.h"

namespace tenfold {

class Memory {
 public:
  explicit Memory(size_t expected) { spans_.reserve(expected); }
  // A dense tensor: name[index].
  void reads(const char* name, size_t index, const Tensor& t) { add(name, index, t, false); }
  void writes(const char* name, size_t index, const Tensor& t) { add(name, index, t, true); }
  // ValueError if what is written overlaps anything else; names both.
  void check(const char* op);

 private:
  struct Span {
    uintptr_t begin, end;
    const char* name;
    uint32_t index;
    bool written;
  };
  void add(const char* name, size_t index, const Tensor& t, bool written) {
    const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
    const auto bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
    if (bytes > 0)
      spans_.push_back({begin, begin + bytes, name, static_cast<uint32_t>(index), written});
  }
  void sort();
  std::vector<Span> spans_;
};

}  // namespace tenfold
