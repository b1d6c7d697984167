// SPDX-License-Identifier: Apache-2.0
// Copying stretches of tokens. For ISA sources.
#pragma once

#include <cstdint>

#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kChunkBytes = 64;

template <class T>
inline void fill_tokens(T* to, T* end, T value) {
  for (; to < end; ++to) *to = value;
}

// n tokens in whole chunks, which may write and read past them, up to `room` in all. The first
// kFirst chunks are copied whatever n is, so that no branch depends on most lengths.
template <int kFirst, class T>
inline void copy_tokens(T* to, const T* from, int64_t n, int64_t room) {
  constexpr int64_t kChunk = kChunkBytes / sizeof(T), kAlways = kFirst * kChunk;
  if ((n + kAlways) / kChunk * kChunk <= room) [[likely]] {
    for (int64_t i = 0; i < kAlways; i += kChunk) __builtin_memcpy(to + i, from + i, kChunkBytes);
    for (int64_t i = kAlways; i < n; i += kChunk) __builtin_memcpy(to + i, from + i, kChunkBytes);
  } else {
    __builtin_memcpy(to, from, static_cast<uint64_t>(n) * sizeof(T));
  }
}

// A row that is written from left to right.
template <class T>
struct TokenWriter {
  T *at, *end;

  void put(T value) { *at++ = value; }
  // `readable`: tokens that may be read from `from` on. kFirst: chunks that most lengths take.
  template <int kFirst = 1>
  void copy(const T* from, int64_t n, int64_t readable) {
    const int64_t left = end - at;
    copy_tokens<kFirst>(at, from, n, left < readable ? left : readable);
    at += n;
  }
  void pad(T value) { fill_tokens(at, end, value); }
};

}  // namespace
TENFOLD_ISA_END
