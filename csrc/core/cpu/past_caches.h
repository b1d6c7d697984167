// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace tenfold::cpu {

// Whether a result of so many bytes is written past the caches, which would not hold it anyway and
// would first read what it overwrites. Not over an input: that is in the caches. Fresh memory of up
// to 16 MB is, too: the allocator hands out what was freed last.
inline bool past_caches(int64_t bytes, bool fresh) {
  return bytes >= int64_t{fresh ? 16 : 8} << 20;
}

}  // namespace tenfold::cpu
