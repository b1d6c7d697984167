// SPDX-License-Identifier: Apache-2.0
// What the CUDA registrations of the head operations share.
#pragma once

#include "attention/heads_ops.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tenfold::cuda {

// Grids are one-dimensional and CUDA allows 2^31 - 1 blocks.
inline void check_blocks(const char* op, int64_t blocks) {
  TENFOLD_CHECK_VALUE(blocks < int64_t{1} << 31, "tenfold::", op, ": the problem needs ", blocks,
                      " CUDA blocks, at most 2^31 - 1 are possible; split it");
}

}  // namespace tenfold::cuda
