// SPDX-License-Identifier: Apache-2.0
// A row's flags as bits, 32 a word, and how many are set before each word. One block a row.
#pragma once

#include "core/convert.cuh"
#include "core/scan.cuh"

namespace tenfold::cuda {

constexpr int kSpanThreads = 256;

TENFOLD_HD int64_t bit_words(int64_t n) {
  return (n + 31) / 32;
}

// Position of the lowest set bit of x != 0.
__device__ inline int lowest_bit(uint32_t x) {
  return __popc((x & (0u - x)) - 1u);
}

// Each bit is set by one thread, once: a sum is what an "or" is.
__device__ inline void set_bit(uint32_t* words, int64_t i) {
  atomicAdd(&words[i / 32], 1u << (i % 32));
}

__device__ inline bool bit_at(const uint32_t* words, int64_t i) {
  return (words[i / 32] >> (i % 32) & 1u) != 0;
}

template <class T>
__device__ inline void block_fill(T* to, int64_t n, T value) {
  for (int64_t i = threadIdx.x; i < n; i += kSpanThreads) to[i] = value;
}

// words[i / 32] of flag(i), i < n. Begins without, ends with a barrier.
template <class F>
__device__ inline void block_flags(uint32_t* words, int64_t n, const F& flag) {
  for (int64_t first = 0; first < n; first += kSpanThreads) {
    const int64_t i = first + threadIdx.x;
    const uint32_t word = __ballot_sync(0xFFFFFFFFu, i < n && flag(i));
    if (threadIdx.x % 32 == 0 && i < n) words[i / 32] = word;
  }
  __syncthreads();
}

// before[w] = sum of count(v) over the words v < w of `words`; returns the sum of all. `sums`:
// kSpanThreads / 32 shared numbers. Ends with a barrier.
template <class F>
__device__ inline int64_t block_ranks(int64_t words, int32_t* before, int64_t* sums,
                                      const F& count) {
  int64_t carry = 0;
  for (int64_t first = 0; first < words; first += kSpanThreads) {
    const int64_t w = first + threadIdx.x;
    int64_t total;
    const int64_t mine = block_before<kSpanThreads>(w < words ? count(w) : 0, sums, &total);
    if (w < words) before[w] = static_cast<int32_t>(carry + mine);
    carry += total;
  }
  __syncthreads();
  return carry;
}

}  // namespace tenfold::cuda
