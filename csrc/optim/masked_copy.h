// SPDX-License-Identifier: Apache-2.0
// masked_copy_ (Half-Reset, restoring frozen values): dst[i] = src[i] where the mask's bit is set.
//
// Tensors of a list are independent; dst is dense and walked in storage order, src has its strides.
// One dtype: bits are copied. float32, bfloat16 and float16 may differ and are rounded to nearest,
// as by Tensor.copy_. Nothing else of dst changes by a bit.
// Traffic: rows and blocks that are not copied are neither read nor written; with an element or
// column mask src and dst are read and dst is written.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"
#include "optim/mask.h"

namespace tenfold {

// Elements [begin, end) of `size` = 1, 2, 4 or 8 bytes. stream: long runs go past the caches.
TENFOLD_ISA_DECLARE(void masked_copy_bits(void* dst, const void* src, int64_t size,
                                          const Mask& mask, int64_t begin, int64_t end,
                                          bool stream))
TENFOLD_ISA_DECLARE(void masked_copy_rounded(void* dst, Dtype to, const void* src, Dtype from,
                                             const Mask& mask, int64_t begin, int64_t end))

}  // namespace tenfold
