// SPDX-License-Identifier: Apache-2.0
// Two vectors of neighbours at a time, for ISA sources. bfloat16 comes as the even and the odd ones
// of them, which needs no shuffle: for loops that do not mind the order, because all that they join
// is bfloat16. Others ask for it (kOrdered).
#pragma once

#include "core/cpu/read_ahead.h"

namespace tenfold::TENFOLD_ISA {
namespace {

template <class T>
constexpr bool kSplit = false;
#if defined(TENFOLD_ISA_AVX2) || defined(TENFOLD_ISA_AVX512)
template <>
constexpr bool kSplit<bf16_t> = true;
#endif

template <bool kOrdered, class T>
[[gnu::always_inline]] inline void get_two(const T* p, VF (&x)[2]) {
  if constexpr (kSplit<T> && !kOrdered) {
    load_pair(p, &x[0], &x[1]);
  } else {
    x[0] = load(p);
    x[1] = load(p + kWidth);
  }
}

// The same of an array that is read once, from one end to the other.
template <bool kOrdered, class T>
[[gnu::always_inline]] inline void get_next_two(const T* p, VF (&x)[2]) {
  read_ahead<2 * kWidth>(p);
  get_two<kOrdered>(p, x);
}

inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % (kWidth * sizeof(float)) == 0;
}

// `past`: past the caches, where p is aligned. Order with stream_fence().
template <bool kOrdered, class T>
[[gnu::always_inline]] inline void put_two(T* p, const VF (&x)[2], bool past) {
  if (past) {
    if constexpr (sizeof(T) == 4) {
      stream(p, x[0]);
      stream(p + kWidth, x[1]);
    } else {
      alignas(64) float both[kWidth];
      put_two<kOrdered>(reinterpret_cast<T*>(both), x, false);
      stream(reinterpret_cast<float*>(p), load(both));
    }
    return;
  }
  if constexpr (kSplit<T> && !kOrdered) {
    store_pair(p, x[0], x[1]);
  } else {
    store_quick(p, x[0]);
    store_quick(p + kWidth, x[1]);
  }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
