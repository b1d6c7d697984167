// SPDX-License-Identifier: Apache-2.0
// Device code of moe_sort. The slots are cut into parts, a warp each, which walks over its slots 32
// at a time: lanes with one expert find each other by ballots, so slots are counted, and placed, in
// order and without atomics. Counts by (expert, part) become first positions in one running sum.
// Few counts fit shared memory, and all is one launch of one block; else they are three.
#pragma once

#include "core/convert.cuh"
#include "core/scan.cuh"

namespace tenfold::cuda {

constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / 32;
constexpr int kWalkThreads = 256;         // of a block of the long form
constexpr int64_t kSharedCounts = 8192;   // 32 KB
constexpr int64_t kShortSlots = 32768;    // of the form of one block
constexpr int64_t kMostParts = 1024;      // of the long form
constexpr int64_t kMostCounts = 1 << 24;  // there, unless there are more experts
constexpr int64_t kFewestSlots = 256;     // of a part there

struct SortArgs {
  IntArray index;  // negative: left out, as those of n and more
  int64_t slots, experts;
  int32_t *order, *inverse;   // [slots]
  int32_t *counts, *offsets;  // [experts], [experts + 1]
  int64_t parts, part;        // part: slots of one, a multiple of 32
  bool one_block;
  int32_t* first;  // [experts][parts], unless one_block
};

inline int64_t in_warps(int64_t slots) {
  return (slots + 31) / 32 * 32;
}

// All but the tensors.
inline SortArgs sort_shape(int64_t slots, int64_t experts) {
  SortArgs a{};
  a.slots = slots, a.experts = experts;
  const auto cut = [&](int64_t parts) {
    const int64_t most = in_warps(slots) / 32;
    parts = parts < most ? parts : most;
    parts = parts < 1 ? 1 : parts;
    a.part = in_warps((slots + parts - 1) / parts);
    a.part = a.part < 32 ? 32 : a.part;
    a.parts = slots > 0 ? (slots + a.part - 1) / a.part : 1;
  };
  cut(kSortWarps);
  a.one_block = slots <= kShortSlots && experts * a.parts <= kSharedCounts;
  if (a.one_block) return a;
  int64_t parts = (slots + kFewestSlots - 1) / kFewestSlots;
  parts = parts < kMostParts ? parts : kMostParts;
  const int64_t room = kMostCounts / experts;
  cut(parts < room ? parts : room);
  return a;
}

inline int64_t sort_ints(const SortArgs& a) {  // of `first`
  return a.one_block ? 0 : a.experts * a.parts;
}

// Lanes of the warp with the same key of `bits` bits.
__device__ inline uint32_t lanes_like(uint32_t key, int bits) {
  uint32_t same = 0xFFFFFFFFu;
  for (int b = 0; b < bits; ++b) {
    const bool one = (key >> b & 1u) != 0;
    const uint32_t ones = __ballot_sync(0xFFFFFFFFu, one);
    same &= one ? ones : ~ones;
  }
  return same;
}

__device__ inline int bits_for(uint32_t most) {
  int bits = 0;
  for (; most != 0; most >>= 1) ++bits;
  return bits;
}

// One warp. kPlace: next[e parts] is the position of the next slot of expert e in this part;
// else slots are counted there.
template <bool kPlace>
__device__ inline void walk_part(const SortArgs& a, int64_t part, int32_t* next) {
  const int lane = threadIdx.x % 32, bits = bits_for(static_cast<uint32_t>(a.experts));
  const int64_t begin = part * a.part;
  const int64_t end = begin + a.part < a.slots ? begin + a.part : a.slots;
  if constexpr (!kPlace) {
    for (int64_t e = lane; e < a.experts; e += 32) next[e * a.parts] = 0;
    __syncwarp();
  }
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t q = first + lane;
    int64_t e = q < end ? a.index[q] : a.experts;
    if (e < 0 || e > a.experts) e = a.experts;
    const uint32_t same = lanes_like(static_cast<uint32_t>(e), bits);
    const uint32_t before = same & ((1u << lane) - 1u);
    const bool routed = e < a.experts;
    int32_t* const mine = next + (routed ? e * a.parts : 0);
    const int32_t at = routed ? *mine : 0;
    __syncwarp();
    if (routed && before == 0) *mine = at + __popc(same);
    __syncwarp();
    if (!kPlace || q >= end) continue;
    const int32_t place = at + __popc(before);
    if (routed) a.order[place] = static_cast<int32_t>(q);
    a.inverse[q] = routed ? place : -1;
  }
}

// In place, over counts [experts][parts], and what follows from it. One block of kSortThreads, each
// of which takes kEach numbers at a time. Ends with a barrier.
__device__ inline void scan_counts(const SortArgs& a, int32_t* counts, int64_t* sums) {
  constexpr int kEach = 8;
  const int64_t n = a.experts * a.parts;
  int64_t carry = 0;
  for (int64_t tile = 0; tile < n; tile += kSortThreads * kEach) {
    const int64_t first = tile + threadIdx.x * kEach;
    int32_t x[kEach];
    int64_t mine = 0, total;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      x[k] = first + k < n ? counts[first + k] : 0;
      mine += x[k];
    }
    int64_t before = carry + block_before<kSortThreads>(mine, sums, &total);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (first + k < n) counts[first + k] = static_cast<int32_t>(before);
      before += x[k];
    }
    carry += total;
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e <= a.experts; e += kSortThreads) {
    const auto offset = [&](int64_t i) {
      return i < a.experts ? counts[i * a.parts] : static_cast<int32_t>(carry);
    };
    a.offsets[e] = offset(e);
    if (e < a.experts) a.counts[e] = offset(e + 1) - offset(e);
  }
  __syncthreads();
}

// Positions of a part from the last routed one on hold nothing.
__device__ inline void fill_rest(const SortArgs& a, int64_t part, int64_t routed) {
  const int64_t begin = part * a.part;
  const int64_t end = begin + a.part < a.slots ? begin + a.part : a.slots;
  for (int64_t p = (begin > routed ? begin : routed) + threadIdx.x % 32; p < end; p += 32)
    a.order[p] = -1;
}

static __global__ void __launch_bounds__(kSortThreads) sort_kernel(SortArgs a) {
  TENFOLD_SHARED(int32_t, next, kSharedCounts);
  TENFOLD_SHARED(int64_t, sums, kSortWarps);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < a.parts) walk_part<false>(a, warp, next + warp);
  __syncthreads();
  scan_counts(a, next, sums);
  if (warp >= a.parts) return;
  fill_rest(a, warp, a.offsets[a.experts]);
  walk_part<true>(a, warp, next + warp);
}

template <bool kPlace>
__global__ void __launch_bounds__(kWalkThreads) walk_kernel(SortArgs a) {
  const int64_t part = static_cast<int64_t>(blockIdx.x) * (kWalkThreads / 32) + threadIdx.x / 32;
  if (part >= a.parts) return;
  if (kPlace) fill_rest(a, part, a.offsets[a.experts]);
  walk_part<kPlace>(a, part, a.first + part);
}

static __global__ void __launch_bounds__(kSortThreads) scan_counts_kernel(SortArgs a) {
  TENFOLD_SHARED(int64_t, sums, kSortWarps);
  scan_counts(a, a.first, sums);
}

inline void launch_sort(const SortArgs& a, cudaStream_t stream) {  // of sort_shape
  if (a.one_block) {
    TENFOLD_LAUNCH(sort_kernel, 1, kSortThreads, stream, a);
    return;
  }
  const auto blocks = static_cast<unsigned>((a.parts * 32 + kWalkThreads - 1) / kWalkThreads);
  TENFOLD_LAUNCH(walk_kernel<false>, blocks, kWalkThreads, stream, a);
  TENFOLD_LAUNCH(scan_counts_kernel, 1, kSortThreads, stream, a);
  TENFOLD_LAUNCH(walk_kernel<true>, blocks, kWalkThreads, stream, a);
}

}  // namespace tenfold::cuda
