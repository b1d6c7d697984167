// SPDX-License-Identifier: Apache-2.0
// A list of tensors in the arguments of a kernel: one block per chunk of a tensor, and which
// elements of 16 bytes train. A launch takes kListed tensors; a longer list is several launches.
#pragma once

#include "core/convert.cuh"
#include "optim/mask.h"

namespace tenfold::cuda {

constexpr int kListThreads = 512;
constexpr int64_t kListChunk = 65536;  // elements of a block
constexpr int kListed = 512;           // 60 bytes each: a launch takes 32,764

struct Listed {
  const void* from;
  void* to;  // null where nothing is written
  Mask mask;
  int64_t numel;
  int32_t dtype;  // Dtype of `from`, where that matters
  bool vectors;   // 16-byte vectors of both are aligned
};

struct TensorList {
  Listed tensor[kListed];
  uint32_t first[kListed + 1];  // chunks before each tensor
  int32_t count;
  uint32_t chunks;  // of the lists launched before
};

inline int64_t list_chunks(int64_t numel) {
  return (numel + kListChunk - 1) / kListChunk;
}

__device__ inline int find_listed(const TensorList& list, uint32_t chunk) {
  int low = 0, high = list.count;  // first[low] <= chunk < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (list.first[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

__device__ inline int64_t quotient(int64_t i, int64_t by) {
  if (((i | by) >> 32) == 0)
    return static_cast<uint32_t>(i) / static_cast<uint32_t>(by);  // a tenth of the other's price
  return i / by;
}

// Bit k: whether element i + k trains, k < N <= 16; i is a multiple of N.
template <int N>
__device__ inline uint32_t trained_bits(const Mask& mask, int64_t i, int n) {
  const uint32_t all = (1u << n) - 1u;
  if (mask.kind == MaskKind::none) return all;
  if (mask.kind == MaskKind::element) {
    uint32_t bits = mask.bits[i >> 3];
    if (N > 8 && n > 8) bits |= static_cast<uint32_t>(mask.bits[(i >> 3) + 1]) << 8;
    return bits >> (i & 7) & all;
  }
  const int64_t unit = quotient(i, mask.inner), in_unit = i - unit * mask.inner;
  uint32_t bits = 0;
  if (mask.kind == MaskKind::col) {
    int64_t col = in_unit;
    for (int k = 0; k < n; ++k) {
      bits |= (mask_bit(mask.bits, col) ? 1u : 0u) << k;
      if (++col == mask.inner) col = 0;
    }
    return bits;
  }
  if (in_unit + n <= mask.inner) return mask_bit(mask.bits, unit) ? all : 0u;
  for (int k = 0; k < n; ++k)
    bits |= (mask_bit(mask.bits, quotient(i + k, mask.inner)) ? 1u : 0u) << k;
  return bits;
}

// Fills lists from n tensors and calls launch(list, blocks) for each that has a block.
// tensor(i) returns a Listed.
template <class TensorAt, class LaunchList>
void launch_lists(int64_t n, TensorAt tensor, LaunchList launch) {
  TensorList list{};
  uint32_t before = 0;
  const auto flush = [&] {
    const uint32_t blocks = list.first[list.count];
    list.chunks = before;
    if (blocks > 0) launch(list, blocks);
    before += blocks;
    list.count = 0;
  };
  for (int64_t i = 0; i < n; ++i) {
    const Listed t = tensor(i);
    const auto chunks = static_cast<uint32_t>(list_chunks(t.numel));
    list.first[list.count + 1] = (list.count == 0 ? 0 : list.first[list.count]) + chunks;
    list.first[0] = 0;
    list.tensor[list.count++] = t;
    if (list.count == kListed) flush();
  }
  if (list.count > 0) flush();
}

}  // namespace tenfold::cuda
