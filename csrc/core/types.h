// SPDX-License-Identifier: Apache-2.0
// Storage types and scalar-type tags that kernels see. No torch header: ISA files include this.
#pragma once

#include <cstdint>

namespace tenfold {

struct bf16_t {
  uint16_t bits;
};

struct fp16_t {
  uint16_t bits;
};

enum class Dtype : int { f32, bf16, f16 };

constexpr int64_t dtype_size(Dtype t) {
  return t == Dtype::f32 ? 4 : 2;
}

}  // namespace tenfold
