// SPDX-License-Identifier: Apache-2.0
// Which row an error is about, whatever the number of threads: the first bad one.
#pragma once

#include <atomic>
#include <cstdint>

namespace tenfold::cpu {

inline void lower(std::atomic<int64_t>& least, int64_t row) {
  int64_t before = least.load();
  while (row < before && !least.compare_exchange_weak(before, row)) {
  }
}

}  // namespace tenfold::cpu
