#pragma once

#include <cstdint>

namespace tenfold::cpu {

// Whether a result of so many bytes is written past the caches, which would not hold it anyway and
// would first read what it overwrites. Not over an input: that is in the caches.
inline bool past_caches(int64_t bytes) {
  return bytes >= int64_t{8} << 20;
}

}  // namespace tenfold::cpu
