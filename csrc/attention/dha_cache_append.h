// SPDX-License-Identifier: Apache-2.0
// dha_cache_append_: new keys (rotated if asked) and values into their slots of a cache.
//
//   K[slot[b, s], h] = k[b, h, s] * cos[b, s] + rotate_half(k[b, h, s]) * sin[b, s]   (or k alone)
//   V[slot[b, s], h] = v[b, h, s]
//
// Layouts and parameters: dha_decode.h. Traffic: k and v read once and written once.
#pragma once

#include "attention/dha_decode.h"
#include "core/cpu/isa.h"

namespace tenfold {

// One row of head_dim elements: to = k * cos + rotate_half(k) * sin, in float, rounded once.
struct RotateRow {
  const void* k;
  const void* cos;
  const void* sin;
  void* to;
  int64_t head_dim;
  Dtype dtype, angle_dtype;
};

TENFOLD_ISA_DECLARE(void rotate_row(const RotateRow& r))

}  // namespace tenfold
