// SPDX-License-Identifier: Apache-2.0
// Device code of mask_topk and mask_random: a radix selection over the keys, most significant
// digits first. Each digit is one pass that counts the keys agreeing so far (a histogram a block in
// shared memory, added up in integers), and one block that finds the bin of the wanted-th largest.
// Then each tile of keys learns how many keys equal to the cut lie before it, and writes its bits.
// No digit is read back: state stays in device memory.
#pragma once

#include "core/convert.cuh"
#include "core/radix.cuh"
#include "optim/mask_topk.h"

namespace tenfold::cuda {

constexpr int kTopkThreads = 256;
static_assert(kKeyBins == kRadixBins);
constexpr int64_t kTopkTile = 16384;  // keys of a block when ties are counted and bits written

struct TopkArgs {
  KeySource source;
  int64_t n, k;
  RadixState* state;
  int64_t* ties;  // of each tile
  uint8_t* bits;
};

inline int64_t topk_tiles(int64_t n) {
  return (n + kTopkTile - 1) / kTopkTile;
}

__device__ inline uint32_t key_at(const KeySource& s, int64_t i) {
  if (s.score == nullptr) return random_key(s, i);
  if (s.dtype == Dtype::f32) return score_key(static_cast<const uint32_t*>(s.score)[i]);
  if (s.dtype == Dtype::bf16)
    return score_key(static_cast<uint32_t>(static_cast<const bf16_t*>(s.score)[i].bits) << 16);
  return score_key(float_to_bits(to_float(static_cast<const fp16_t*>(s.score)[i])));
}

__global__ void __launch_bounds__(kTopkThreads) topk_start_kernel(TopkArgs a) {
  radix_start<kTopkThreads>(*a.state, a.k);  // nothing is wanted: no key is above the largest
}

__global__ void __launch_bounds__(kTopkThreads) topk_count_kernel(TopkArgs a, int digit) {
  TENFOLD_SHARED(uint32_t, bins, kKeyBins);
  for (int i = threadIdx.x; i < kKeyBins; i += kTopkThreads) bins[i] = 0;
  __syncthreads();
  const uint32_t prefix = a.state->prefix;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTopkThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kTopkThreads + threadIdx.x; i < a.n;
       i += step) {
    const uint32_t key = key_at(a.source, i);
    if (agrees(key, prefix, digit)) atomicAdd(&bins[digit_of(key, digit)], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kKeyBins; i += kTopkThreads)
    if (bins[i] != 0) atomicAdd(&a.state->bins[digit][i], static_cast<unsigned long long>(bins[i]));
}

__global__ void __launch_bounds__(kFindThreads) topk_find_kernel(TopkArgs a, int digit) {
  TENFOLD_SHARED(int64_t, sums, kFindThreads / 32);
  radix_find(*a.state, digit, sums);
}

// Calls visit(i0, key of this lane, whether it exists) for each 32 keys of this warp's part of the
// tile, in order.
template <class Visit>
__device__ inline void for_each_word(const TopkArgs& a, int64_t tile, Visit visit) {
  constexpr int64_t kPart = kTopkTile / (kTopkThreads / 32);
  const int64_t first = tile * kTopkTile + threadIdx.x / 32 * kPart;
  const int64_t end = first + kPart < a.n ? first + kPart : a.n;
  for (int64_t i0 = first; i0 < end; i0 += 32) {
    const int64_t i = i0 + threadIdx.x % 32;
    visit(i0, i < end ? key_at(a.source, i) : 0, i < end);
  }
}

__global__ void __launch_bounds__(kTopkThreads) topk_ties_kernel(TopkArgs a) {
  TENFOLD_SHARED(int64_t, sums, kTopkThreads / 32);
  const uint32_t cut = a.state->prefix;
  int64_t mine = 0;
  for_each_word(a, blockIdx.x,
                [&](int64_t, uint32_t key, bool exists) { mine += exists && key == cut ? 1 : 0; });
  mine = warp_sum(mine);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t total = 0;
  for (int warp = 0; warp < kTopkThreads / 32; ++warp) total += sums[warp];
  a.ties[blockIdx.x] = total;
}

// a.ties: of all tiles before.
__global__ void __launch_bounds__(kTopkThreads) topk_write_kernel(TopkArgs a) {
  TENFOLD_SHARED(int64_t, sums, kTopkThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t cut = a.state->prefix;
  int64_t left = a.state->wanted - a.ties[blockIdx.x];  // ties to take from here on
  const bool some = left > 0;                           // else the order of ties does not matter
  if (some) {
    int64_t mine = 0;
    for_each_word(a, blockIdx.x, [&](int64_t, uint32_t key, bool exists) {
      mine += __popc(__ballot_sync(0xFFFFFFFFu, exists && key == cut));
    });
    if (lane == 0) sums[warp] = mine;
    __syncthreads();
    for (int w = 0; w < warp; ++w) left -= sums[w];
  }
  for_each_word(a, blockIdx.x, [&](int64_t i0, uint32_t key, bool exists) {
    const uint32_t over = __ballot_sync(0xFFFFFFFFu, exists && key > cut);
    const uint32_t same = __ballot_sync(0xFFFFFFFFu, exists && key == cut);
    const bool tie = (same >> lane & 1u) != 0 && __popc(same & ((1u << lane) - 1u)) < left;
    const uint32_t word = over | __ballot_sync(0xFFFFFFFFu, tie);
    left -= __popc(same);
    const int64_t at = i0 / 8 + lane;
    if (lane < 4 && at < (a.n + 7) / 8) a.bits[at] = static_cast<uint8_t>(word >> (8 * lane));
  });
}

inline void launch_mask_topk(const TopkArgs& a, cudaStream_t stream) {
  if (a.n == 0) return;
  const int64_t tiles = topk_tiles(a.n);
  const auto blocks = static_cast<unsigned>(tiles < 1056 ? tiles : 1056);  // 8 on each of 132
  TENFOLD_LAUNCH(topk_start_kernel, 1, kTopkThreads, stream, a);
  if (a.k > 0) {
    for (int digit = 0; digit < kRadixDigits; ++digit) {
      TENFOLD_LAUNCH(topk_count_kernel, blocks, kTopkThreads, stream, a, digit);
      TENFOLD_LAUNCH(topk_find_kernel, 1, kFindThreads, stream, a, digit);
    }
  }
  TENFOLD_LAUNCH(topk_ties_kernel, static_cast<unsigned>(tiles), kTopkThreads, stream, a);
  launch_scan(a.ties, tiles, stream);
  TENFOLD_LAUNCH(topk_write_kernel, static_cast<unsigned>(tiles), kTopkThreads, stream, a);
}

}  // namespace tenfold::cuda
