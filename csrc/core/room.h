// SPDX-License-Identifier: Apache-2.0
// Working memory of the device, for launch code that knows no tensors.
#pragma once

#include <cstdint>
#include <functional>

namespace tenfold::cuda {

// Device memory that lives until the call's kernels have run.
using Room = std::function<void*(int64_t bytes)>;

inline int64_t cuts(int64_t n, int64_t of) {
  return (n + of - 1) / of;
}

}  // namespace tenfold::cuda
