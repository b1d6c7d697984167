// SPDX-License-Identifier: Apache-2.0
// One number for each row, in int32 or int64.
#pragma once

#include "core/check.h"
#include "core/contiguous.h"
#include "core/tensor.h"

namespace tenfold {

// Of an int32 or int64 tensor on the CPU, contiguous: what it holds, without asking it each time.
class RowInts {
 public:
  explicit RowInts(const Tensor& t)
      : data_(static_cast<const char*>(t.data_ptr())), wide_(t.scalar_type() == ScalarType::Long) {}
  bool wide() const { return wide_; }
  const char* at(int64_t i) const { return data_ + i * (wide_ ? 8 : 4); }
  int64_t operator[](int64_t i) const {
    return wide_ ? *reinterpret_cast<const int64_t*>(at(i))
                 : *reinterpret_cast<const int32_t*>(at(i));
  }

 private:
  const char* data_;
  bool wide_;
};

}  // namespace tenfold
