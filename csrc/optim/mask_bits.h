// SPDX-License-Identifier: Apache-2.0
// Packed masks (see mask.h): pack_mask, unpack_mask, mask_popcount, mask_prefix.
//
//   pack_mask(mask bool, any shape)  -> uint8 [ceil(n / 8)], bit i = flattened element i, tail 0
//   unpack_mask(packed, n)           -> bool [n]
//   mask_popcount(packed)            -> int64 [], number of set bits
//   mask_prefix(packed, block)       -> int32 [ceil(8 * bytes / block)], set bits before each block
//                                       of `block` bits (exclusive)
//
// Traffic: every input and output byte once; mask_prefix reads the mask twice, the second time
// mostly from the cache.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"

namespace tenfold {

// bits [n / 8 rounded up] of n bytes, where byte != 0; unused bits 0.
TENFOLD_ISA_DECLARE(void mask_pack(const uint8_t* bytes, int64_t n, uint8_t* bits))
// n bytes 0 or 1.
TENFOLD_ISA_DECLARE(void mask_unpack(const uint8_t* bits, int64_t n, uint8_t* bytes))
TENFOLD_ISA_DECLARE(int64_t mask_count(const uint8_t* bits, int64_t bytes))
// before + set bits before each step of `step` bytes (a multiple of 4), for ceil(bytes / step).
TENFOLD_ISA_DECLARE(void mask_prefix_steps(const uint8_t* bits, int64_t bytes, int64_t step,
                                           int32_t before, int32_t* prefix))

}  // namespace tenfold
