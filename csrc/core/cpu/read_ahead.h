// SPDX-License-Identifier: Apache-2.0
// For loops that read long arrays once and do much per element: a core looks ahead only as far as
// its waiting operations fit, which is a few lines there, and the hardware's prefetcher begins anew
// at every page. On a Xeon of 2023 selective_logprob takes 8.0 ms without and 4.7 ms with this (25M
// bf16 logits).
#pragma once

#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

// Bytes: 1 to 2 KB measure alike, less comes too late, more is pushed out again.
constexpr int64_t kReadAhead = 1536;

// Asks for what lies so far after the kCount elements from p on. The end of an array does not
// matter.
template <int64_t kCount, class T>
inline void read_ahead(const T* p) {
  const auto* const at = reinterpret_cast<const char*>(p) + kReadAhead;
  constexpr int64_t kBytes = kCount * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

}  // namespace
TENFOLD_ISA_END
