// SPDX-License-Identifier: Apache-2.0
// Device code of ties_merge: a radix selection finds the magnitude of each expert's last element
// that stays, three passes over the inputs whatever the number of experts, and a fourth one merges.
// Where more elements have that magnitude than may stay, they stay by index: then tiles count
// theirs before (a launch that does nothing else), and only the one tile of an expert within which
// the last of them lies has to put its own in order.
#pragma once

#include "core/radix.cuh"
#include "merge/cuda/mix.cuh"

namespace tenfold::cuda {

constexpr int kTiesThreads = 256, kTiesPer = 8;  // elements of a thread at a time
constexpr int64_t kTiesStep = kTiesThreads * kTiesPer, kTiesTile = 4 * kTiesStep;
constexpr int kCounted = 6;                // experts that are counted together: 48 KB
constexpr int64_t kCountBlocks = 4 * 132;  // at most

struct TiesArgs {
  DeltaMerge m;
  int64_t n, tiles;
  bool wide;
  int64_t kept[kMaxExperts];
  RadixState* state;  // [experts]
  int64_t* ties;      // [experts][tiles]

  TENFOLD_HD_MEMBER bool selects(int e) const { return kept[e] > 0 && kept[e] < n; }
};

inline int64_t ties_tiles(int64_t n) {
  return (n + kTiesTile - 1) / kTiesTile;
}

// All but the memory.
inline TiesArgs ties_args(const DeltaMerge& m, int64_t n, const int64_t* kept) {
  TiesArgs a{};
  a.m = m, a.n = n, a.tiles = ties_tiles(n);
  a.wide = all_aligned(m.expert, m.experts, m.base, m.out);
  for (int e = 0; e < m.experts; ++e) a.kept[e] = kept[e];
  return a;
}

// A block an expert. All stay: the cut is below every key.
static __global__ void __launch_bounds__(kTiesThreads) ties_start_kernel(TiesArgs a) {
  const int e = static_cast<int>(blockIdx.x);
  RadixState& s = a.state[e];
  radix_start<kTiesThreads>(s, a.selects(e) ? a.kept[e] : 0);
  if (threadIdx.x == 0 && a.kept[e] >= a.n) s.prefix = 0;
}

// Keys of the elements from i on; 0, which no element has, where there is none.
template <class T>
__device__ inline void keys_of(const TiesArgs& a, int e, int64_t i, const float (&base)[kTiesPer],
                               uint32_t (&keys)[kTiesPer]) {
  float x[kTiesPer];
  load_run<T>(a.m.expert[e], i, a.n, a.wide, x);
#pragma unroll
  for (int k = 0; k < kTiesPer; ++k)
    keys[k] = i + k < a.n ? magnitude_key(subtract(x[k], base[k])) : 0;
}

// Experts first .. first + count - 1.
template <class T>
__global__ void __launch_bounds__(kTiesThreads)
    ties_count_kernel(TiesArgs a, int digit, int first, int count) {
  TENFOLD_DYNAMIC_SHARED(memory);
  auto* const bins = reinterpret_cast<uint32_t*>(memory);
  for (int i = threadIdx.x; i < count * kRadixBins; i += kTiesThreads) bins[i] = 0;
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTiesStep;
  for (int64_t i = blockIdx.x * kTiesStep + threadIdx.x * kTiesPer; i < a.n; i += step) {
    float base[kTiesPer];
    load_run<T>(a.m.base, i, a.n, a.wide, base);
    for (int e = 0; e < count; ++e) {
      if (!a.selects(first + e)) continue;
      const uint32_t prefix = a.state[first + e].prefix;
      uint32_t keys[kTiesPer];
      keys_of<T>(a, first + e, i, base, keys);
#pragma unroll
      for (int k = 0; k < kTiesPer; ++k)
        if (keys[k] != 0 && agrees(keys[k], prefix, digit))
          atomicAdd(&bins[e * kRadixBins + digit_of(keys[k], digit)], 1u);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * kRadixBins; i += kTiesThreads)
    if (bins[i] != 0)
      atomicAdd(&a.state[first + i / kRadixBins].bins[digit][i % kRadixBins],
                static_cast<unsigned long long>(bins[i]));
}

// A block an expert.
static __global__ void __launch_bounds__(kFindThreads) ties_find_kernel(TiesArgs a, int digit) {
  TENFOLD_SHARED(int64_t, sums, kFindThreads / 32);
  if (a.selects(static_cast<int>(blockIdx.x))) radix_find(a.state[blockIdx.x], digit, sums);
}

// How many elements are at the cut of an expert.
__device__ inline int64_t at_cut(const RadixState& s) {
  constexpr int kLast = kRadixDigits - 1;
  return static_cast<int64_t>(s.bins[kLast][digit_of(s.prefix, kLast)]);
}

// Not all of those may stay.
__device__ inline bool by_index(const TiesArgs& a, int e) {
  return a.selects(e) && at_cut(a.state[e]) > a.state[e].wanted;
}

// A block a tile.
template <class T>
__global__ void __launch_bounds__(kTiesThreads) ties_tiles_kernel(TiesArgs a) {
  TENFOLD_SHARED(int64_t, sums, kTiesThreads / 32);
  for (int e = 0; e < a.m.experts; ++e) {
    int64_t mine = 0, total = 0;
    if (by_index(a, e)) {
      const uint32_t cut = a.state[e].prefix;
      const int64_t tile = blockIdx.x * kTiesTile;
      for (int64_t i = tile + threadIdx.x * kTiesPer; i < tile + kTiesTile && i < a.n;
           i += kTiesStep) {
        float base[kTiesPer];
        uint32_t keys[kTiesPer];
        load_run<T>(a.m.base, i, a.n, a.wide, base);
        keys_of<T>(a, e, i, base, keys);
#pragma unroll
        for (int k = 0; k < kTiesPer; ++k) mine += keys[k] == cut ? 1 : 0;
      }
      block_before<kTiesThreads>(mine, sums, &total);
    }
    if (threadIdx.x == 0) a.ties[e * a.tiles + blockIdx.x] = total;
  }
}

// What decides about an expert in a tile: keys from `least` on stay, and where `left` >= 0, of
// those equal to the cut below it the first `left`.
struct TileCut {
  uint32_t least, cut;
  int64_t left;
};

__device__ inline TileCut tile_cut(const TiesArgs& a, int e, int64_t tile) {
  const RadixState& s = a.state[e];
  const uint32_t cut = s.prefix;
  if (!a.selects(e)) return {cut, cut, -1};  // 0 or the largest number: all, or none
  if (!by_index(a, e)) return {cut, cut, -1};
  const int64_t* const before = a.ties + e * a.tiles;
  const int64_t end = tile + 1 < a.tiles ? before[tile + 1] : at_cut(s);
  if (end <= s.wanted) return {cut, cut, -1};
  if (before[tile] >= s.wanted) return {cut + 1, cut, -1};
  return {cut + 1, cut, s.wanted - before[tile]};
}

// A block a tile.
template <class T, Mix kMix>
__global__ void __launch_bounds__(kTiesThreads) ties_merge_kernel(TiesArgs a) {
  TENFOLD_SHARED(TileCut, cuts, kMaxExperts);
  TENFOLD_SHARED(int64_t, sums, kTiesThreads / 32);
  const int64_t tile = blockIdx.x * kTiesTile;
  if (static_cast<int>(threadIdx.x) < a.m.experts)
    cuts[threadIdx.x] = tile_cut(a, static_cast<int>(threadIdx.x), blockIdx.x);
  __syncthreads();
  for (int64_t first = tile; first < tile + kTiesTile && first < a.n; first += kTiesStep) {
    const int64_t i = first + threadIdx.x * kTiesPer;
    float base[kTiesPer];
    load_run<T>(a.m.base, i, a.n, a.wide, base);
    MixSums<kMix> mix[kTiesPer];
    for (int e = 0; e < a.m.experts; ++e) {
      float d[kTiesPer];
      load_run<T>(a.m.expert[e], i, a.n, a.wide, d);
      const TileCut cut = cuts[e];
      uint32_t kept = 0, same = 0;
#pragma unroll
      for (int k = 0; k < kTiesPer; ++k) {
        d[k] = subtract(d[k], base[k]);
        const uint32_t key = magnitude_key(d[k]);
        if (key >= cut.least) kept |= 1u << k;
        if (key == cut.cut && i + k < a.n) same |= 1u << k;
      }
      if (cut.left >= 0) {  // the same for all threads
        int64_t total;
        int64_t before = block_before<kTiesThreads>(__popc(same), sums, &total);
        for (; same != 0; same &= same - 1)
          if (before++ < cut.left) kept |= same & (0u - same);
        if (threadIdx.x == 0) cuts[e].left = cut.left > total ? cut.left - total : 0;
        __syncthreads();
      }
      const float weight = a.m.weight[e], share = a.m.share[e];
#pragma unroll
      for (int k = 0; k < kTiesPer; ++k) mix[k].add((kept >> k & 1u) != 0, d[k], weight, share);
    }
#pragma unroll
    for (int k = 0; k < kTiesPer; ++k) base[k] = mix[k].result(base[k], a.m.lambda);
    store_run<T>(base, a.m.out, i, a.n, a.wide);
  }
}

template <class T>
void launch_ties_merge(const TiesArgs& a, cudaStream_t stream) {
  if (a.n == 0) return;
  const int experts = a.m.experts;
  const auto tiles = static_cast<unsigned>(a.tiles);
  const int64_t steps = (a.n + kTiesStep - 1) / kTiesStep;
  const auto blocks = static_cast<unsigned>(steps < kCountBlocks ? steps : kCountBlocks);
  constexpr int64_t kBytes = kRadixBins * static_cast<int64_t>(sizeof(uint32_t));
  const auto every = static_cast<unsigned>(experts);
  TENFOLD_LAUNCH(ties_start_kernel, every, kTiesThreads, stream, a);
  for (int digit = 0; digit < kRadixDigits; ++digit) {
    for (int first = 0; first < experts; first += kCounted) {
      const int count = experts - first < kCounted ? experts - first : kCounted;
      TENFOLD_LAUNCH_SHARED(ties_count_kernel<T>, blocks, kTiesThreads, count * kBytes,
                            kCounted * kBytes, stream, a, digit, first, count);
    }
    TENFOLD_LAUNCH(ties_find_kernel, every, kFindThreads, stream, a, digit);
  }
  TENFOLD_LAUNCH(ties_tiles_kernel<T>, tiles, kTiesThreads, stream, a);
  launch_scan(a.ties, a.tiles, stream, experts);
  with_mix(a.m, [&]<Mix kMix>() {
    if constexpr (kMix != Mix::plain)  // TIES elects signs
      TENFOLD_LAUNCH((ties_merge_kernel<T, kMix>), tiles, kTiesThreads, stream, a);
  });
}

}  // namespace tenfold::cuda
