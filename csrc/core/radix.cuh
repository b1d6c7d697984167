// SPDX-License-Identifier: Apache-2.0
// The k-th largest of many 32-bit keys, digit by digit from the most significant one: kernels count
// the keys that agree with what is known so far by their next digit, and one block finds in which
// bin the wanted one lies. Nothing is read back: the state stays in device memory.
#pragma once

#include "core/scan.cuh"

namespace tenfold::cuda {

constexpr int kRadixBits = 11, kRadixBins = 1 << kRadixBits, kRadixDigits = 3;
constexpr int kFindThreads = 1024;

TENFOLD_HD int digit_shift(int digit) {  // 11 + 11 + 10 bits
  return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}

struct RadixState {
  unsigned long long bins[kRadixDigits][kRadixBins];
  int64_t wanted;   // the how manieth largest, among the keys that agree with the prefix
  uint32_t prefix;  // after the last digit: the key
  uint32_t unused;
};

// Of a block of kThreads. Without any wanted, the prefix is the largest key.
template <int kThreads>
__device__ inline void radix_start(RadixState& s, int64_t wanted) {
  auto* const bins = &s.bins[0][0];
  for (int i = threadIdx.x; i < kRadixDigits * kRadixBins; i += kThreads) bins[i] = 0;
  if (threadIdx.x != 0) return;
  s.wanted = wanted;
  s.prefix = wanted > 0 ? 0 : 0xFFFFFFFFu;
}

// Whether a key agrees with the digits before this one.
__device__ inline bool agrees(uint32_t key, uint32_t prefix, int digit) {
  return digit == 0 || (key ^ prefix) >> digit_shift(digit - 1) == 0;
}

__device__ inline int digit_of(uint32_t key, int digit) {
  return static_cast<int>(key >> digit_shift(digit) & (kRadixBins - 1));
}

// A block of kFindThreads. Thread t owns bins 2 t and 2 t + 1, counted from the largest key down.
// sums: a shared number per warp.
__device__ inline void radix_find(RadixState& s, int digit, int64_t* sums) {
  static_assert(kRadixBins == 2 * kFindThreads);
  const int high = kRadixBins - 1 - 2 * static_cast<int>(threadIdx.x);
  const auto* bins = s.bins[digit];
  const auto in_high = static_cast<int64_t>(bins[high]);
  const auto in_low = static_cast<int64_t>(bins[high - 1]);
  const int64_t wanted = s.wanted;
  const uint32_t prefix = s.prefix;
  int64_t total;
  const int64_t before = block_before<kFindThreads>(in_high + in_low, sums, &total);
  const int64_t left = wanted - before;
  if (left < 1 || left > in_high + in_low) return;  // true for all threads but one
  const bool in_first = left <= in_high;
  s.wanted = in_first ? left : left - in_high;
  s.prefix = prefix | static_cast<uint32_t>(in_first ? high : high - 1) << digit_shift(digit);
}

}  // namespace tenfold::cuda
