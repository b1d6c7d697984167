// SPDX-License-Identifier: Apache-2.0
// Masks of the optimiser family: which part of a tensor trains.
//
// A mask is a uint8 tensor of packed bits, least significant bit first, unused bits of the last
// byte zero; a set bit means "trains". One bit stands for one *unit* of the tensor in its storage
// order:
//
//   kind     | unit                                            | number of units
//   row      | one index of dimension 0                        | sizes[0]
//   col      | one index of the last dimension                 | sizes[-1]
//   block    | `block` consecutive elements, the last shorter  | ceil(numel / block)
//   element  | one element                                     | numel
//
// row and col need a contiguous tensor of 2 or more dimensions. No mask: everything trains.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace tenfold {

enum class MaskKind : int { none = 0, row = 1, col = 2, block = 3, element = 4 };

// What a kernel knows of one tensor's mask.
struct Mask {
  MaskKind kind = MaskKind::none;  // none: all elements train
  const uint8_t* bits = nullptr;
  int64_t inner = 1;  // row: elements of a row; col: size of the last dimension; block: its length
};

TENFOLD_HD int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

TENFOLD_HD bool mask_bit(const uint8_t* bits, int64_t unit) {
  return (bits[unit >> 3] >> (unit & 7)) & 1;
}

// Whether element `i` (storage order) trains.
TENFOLD_HD bool mask_trains(const Mask& mask, int64_t i) {
  switch (mask.kind) {
    case MaskKind::row:
    case MaskKind::block: return mask_bit(mask.bits, i / mask.inner);
    case MaskKind::col: return mask_bit(mask.bits, i % mask.inner);
    case MaskKind::element: return mask_bit(mask.bits, i);
    default: return true;
  }
}

// Set bits before `unit`, a valid one; `prefix` has those before every `block` bits.
TENFOLD_HD int64_t mask_rank(const uint8_t* bits, const int32_t* prefix, int64_t unit,
                             int64_t block) {
  int64_t count = prefix[unit / block];
  for (int64_t byte = unit / block * block / 8; byte < unit / 8; ++byte)
    count += count_bits(bits[byte]);
  return count + count_bits(bits[unit >> 3] & ((1u << (unit & 7)) - 1));
}

}  // namespace tenfold
