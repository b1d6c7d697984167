// SPDX-License-Identifier: Apache-2.0
// Device code of nacl_select: one block per (sequence, head). Keys (sortable scores, then noisy
// logits) are written once to a workspace; a radix selection reads them in passes of 8 bits, most
// significant first. Slots break ties: only if the boundary key is shared, 4 more passes over the
// slots of that key follow. Then each warp writes the chosen slots of its part of the row in order.
#pragma once

#include "core/convert.cuh"
#include "kv_eviction/nacl_select.h"

namespace tenfold::cuda {

struct SelectArgs {
  NaclSelectParams p;
  const float* scores;  // [B, H, L] contiguous
  IntArray kv_start, kv_lens, row_id, counts;
  uint32_t* keys;     // [B * H, L] workspace
  int64_t* idx;       // [B, H, C]
  int32_t* new_lens;  // [B] or [B, H]
};

// A row is one block's: few rows must not mean few loads in flight, so a long row has all the
// threads that a block can have, and each keeps kStrips loads in flight.
constexpr int kShortRow = 4096, kShortRowThreads = 256, kLongRowThreads = 1024, kStrips = 4;
constexpr int kBins = 256;

__device__ inline float pooled_score(const NaclSelectParams& p, const float* scores, int64_t n,
                                     int64_t i) {
  if (p.pool_kernel == 1) return scores[i];
  const int64_t half = p.pool_kernel / 2;
  const int64_t lo = i - half > 0 ? i - half : 0, hi = i + half + 1 < n ? i + half + 1 : n;
  float r = scores[lo];
  for (int64_t j = lo + 1; j < hi; ++j)
    r = p.pool_max ? (scores[j] > r || scores[j] != scores[j] ? scores[j] : r) : r + scores[j];
  return p.pool_max ? r : r / static_cast<float>(p.pool_kernel);
}

// One digit: among candidates whose key agrees with `prefix` above `shift`, the bin that holds the
// wanted-th largest; `wanted` becomes its rank inside the bin.
struct Digit {
  uint32_t bin;
  int64_t wanted, in_bin;
};

// Warp 0: lane l owns bins 8 l .. 8 l + 7; a suffix sum over the lanes finds the one whose bins
// hold the wanted-th largest.
__device__ inline void find_bin(const uint32_t* histogram, int64_t wanted, int64_t* result) {
  constexpr int kOwn = kBins / 32;
  const int lane = threadIdx.x;
  uint32_t own = 0;
  for (int i = 0; i < kOwn; ++i) own += histogram[lane * kOwn + i];
  uint32_t from_here = own;  // at most L <= 2^30 in all
  for (int step = 1; step < 32; step *= 2) {
    const int other = lane + step < 32 ? lane + step : lane;
    const uint32_t more = __shfl_sync(0xFFFFFFFFu, from_here, other);
    if (lane + step < 32) from_here += more;
  }
  int64_t left = wanted - (from_here - own);
  if (left < 1 || left > own) return;  // true for all lanes but one
  int bin = lane * kOwn + kOwn - 1;
  while (histogram[bin] < left) left -= histogram[bin--];
  result[0] = bin;
  result[1] = left;
  result[2] = histogram[bin];
}

// value_of(i, key, &value): whether slot i takes part, and with which value.
template <int kThreads, class ValueOf>
__device__ inline Digit select_digit(const uint32_t* keys, ValueOf value_of, int64_t n,
                                     uint32_t prefix, int shift, int64_t wanted,
                                     uint32_t* histogram, int64_t* result) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  for (int64_t i0 = threadIdx.x; i0 < n; i0 += kStrips * kThreads) {
    uint32_t key[kStrips];
#pragma unroll
    for (int u = 0; u < kStrips; ++u) {
      const int64_t i = i0 + u * kThreads;
      key[u] = i < n ? keys[i] : 0;
    }
#pragma unroll
    for (int u = 0; u < kStrips; ++u) {
      const int64_t i = i0 + u * kThreads;
      uint32_t value;
      if (i >= n || !value_of(i, key[u], &value)) continue;
      const bool same = shift == 24 || value >> (shift + 8) == prefix >> (shift + 8);
      if (same) atomicAdd(&histogram[(value >> shift) & 0xFFu], 1u);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) find_bin(histogram, wanted, result);
  __syncthreads();
  const Digit d{static_cast<uint32_t>(result[0]), result[1], result[2]};
  __syncthreads();
  return d;
}

// The largest `wanted` of the nonzero keys: chosen iff key > cut.key, or equal and slot <=
// cut.slot.
struct SlotCut {
  uint32_t key;
  int64_t slot;
};

template <int kThreads>
__device__ inline SlotCut radix_cut(const uint32_t* keys, int64_t n, int64_t wanted,
                                    uint32_t* histogram, int64_t* result) {
  uint32_t prefix = 0;
  int64_t in_bin = 0;
  const auto by_key = [](int64_t, uint32_t key, uint32_t* value) {
    *value = key;
    return key != 0;
  };
  for (int shift = 24; shift >= 0; shift -= 8) {
    const Digit d =
        select_digit<kThreads>(keys, by_key, n, prefix, shift, wanted, histogram, result);
    prefix |= d.bin << shift;
    wanted = d.wanted;
    in_bin = d.in_bin;
  }
  if (in_bin == wanted) return {prefix, n};
  // Ties: the wanted lowest slots, that is the wanted largest complements.
  uint32_t complement = 0;
  const auto by_slot = [&](int64_t i, uint32_t key, uint32_t* value) {
    *value = ~static_cast<uint32_t>(i);
    return key == prefix;
  };
  for (int shift = 24; shift >= 0; shift -= 8) {
    const Digit d =
        select_digit<kThreads>(keys, by_slot, n, complement, shift, wanted, histogram, result);
    complement |= d.bin << shift;
    wanted = d.wanted;
  }
  return {prefix, static_cast<int64_t>(~complement)};
}

__device__ inline bool chosen(uint32_t key, int64_t i, SlotCut cut) {
  return key > cut.key || (key == cut.key && i <= cut.slot);
}

// Calls visit(i0, votes) in ascending order for each 32 slots of this warp's part of [0, m): bit l
// of votes: keep(key, i0 + l).
template <int kThreads, class Keep, class Visit>
__device__ inline void for_each_vote(const uint32_t* keys, int64_t m, Keep keep, Visit visit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t part = (m + kThreads - 1) / kThreads * 32;
  const int64_t begin = warp * part, end = begin + part < m ? begin + part : m;
  for (int64_t i0 = begin; i0 < end; i0 += kStrips * 32) {
    uint32_t key[kStrips];
#pragma unroll
    for (int u = 0; u < kStrips; ++u) {
      const int64_t i = i0 + u * 32 + lane;
      key[u] = i < end ? keys[i] : 0;
    }
#pragma unroll
    for (int u = 0; u < kStrips; ++u) {
      const int64_t i = i0 + u * 32 + lane;
      visit(i0 + u * 32, __ballot_sync(0xFFFFFFFFu, i < end && keep(key[u], i)));
    }
  }
}

// Writes the slots that `keep` chooses among [0, m), plus `first`, ascending. Each warp counts its
// part of the row, then writes it: no barriers inside the loops.
template <int kThreads, class Keep>
__device__ inline void write_kept(const uint32_t* keys, int64_t m, Keep keep, int64_t first,
                                  int64_t* out, int* warp_counts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int mine = 0;
  for_each_vote<kThreads>(keys, m, keep, [&](int64_t, unsigned votes) { mine += __popc(votes); });
  if (lane == 0) warp_counts[warp] = mine;
  __syncthreads();
  int64_t filled = 0;
  for (int w = 0; w < warp; ++w) filled += warp_counts[w];
  for_each_vote<kThreads>(keys, m, keep, [&](int64_t i0, unsigned votes) {
    if ((votes >> lane & 1u) != 0)
      out[filled + __popc(votes & ((1u << lane) - 1u))] = first + i0 + lane;
    filled += __popc(votes);
  });
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) nacl_select_kernel(SelectArgs a) {
  TENFOLD_SHARED(uint32_t, histogram, kBins);
  TENFOLD_SHARED(int64_t, result, 3);
  TENFOLD_SHARED(int, warp_counts, kThreads / 32);
  const NaclSelectParams& p = a.p;
  const int64_t row = blockIdx.x, b = row / p.heads, h = row % p.heads;
  int64_t begin = a.kv_start.given() ? a.kv_start[b] : 0;
  begin = begin < 0 ? 0 : begin > p.length ? p.length : begin;
  int64_t n = a.kv_lens.given() ? a.kv_lens[b] : p.length - begin;
  n = n < 0 ? 0 : n > p.length - begin ? p.length - begin : n;
  int64_t c[4] = {p.counts.sink, p.counts.recent, p.counts.topk, p.counts.random};
  int64_t total = 0;
  for (int i = 0; i < 4; ++i) {
    if (a.counts.given()) c[i] = a.counts[(p.counts_per_head ? row : b) * 4 + i];
    c[i] = c[i] < 0 ? 0 : c[i] > p.width - total ? p.width - total : c[i];
    total += c[i];
  }
  int64_t* out = a.idx + row * p.width;
  const int64_t used = n <= total ? n : total;
  for (int64_t i = used + threadIdx.x; i < p.width; i += kThreads) out[i] = -1;
  if (threadIdx.x == 0 && (p.counts_per_head || h == 0))
    a.new_lens[p.counts_per_head ? row : b] = static_cast<int32_t>(used);
  if (n <= total) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) out[i] = begin + i;
    return;
  }
  const int64_t first = begin + c[0], m = n - c[0] - c[1];
  const float* scores = a.scores + row * p.length + first;
  uint32_t* keys = a.keys + row * p.length;
  for (int64_t i = threadIdx.x; i < m; i += kThreads)
    keys[i] = sortable_key(pooled_score(p, scores, m, i));
  __syncthreads();
  SlotCut top{0xFFFFFFFFu, -1};
  if (c[2] > 0) top = radix_cut<kThreads>(keys, m, c[2], histogram, result);
  // From here on keys are those of the draw; 0 (no float's key) marks what is kept already.
  const uint32_t row_id = a.row_id.given() ? static_cast<uint32_t>(a.row_id[b]) : 0u;
  for (int64_t i = threadIdx.x; i < m; i += kThreads) {
    const bool kept = c[2] > 0 && chosen(keys[i], i, top);
    if (kept) {
      keys[i] = 0;
    } else if (c[3] > 0) {
      const Philox4 word =
          philox4x32_10(p.layer, static_cast<uint32_t>(h), static_cast<uint32_t>(c[0] + i), row_id,
                        p.seed_lo, p.seed_hi);
      keys[i] =
          sortable_key(draw_key(pooled_score(p, scores, m, i), p.log_score, p.tau, word.word[0]));
    }
  }
  __syncthreads();
  SlotCut drawn{0xFFFFFFFFu, -1};
  if (c[3] > 0) drawn = radix_cut<kThreads>(keys, m, c[3], histogram, result);
  for (int64_t i = threadIdx.x; i < c[0]; i += kThreads) out[i] = begin + i;
  for (int64_t i = threadIdx.x; i < c[1]; i += kThreads)
    out[total - c[1] + i] = begin + n - c[1] + i;
  const auto keep = [&](uint32_t key, int64_t i) {
    return key == 0 || (c[3] > 0 && chosen(key, i, drawn));
  };
  write_kept<kThreads>(keys, m, keep, first, out + c[0], warp_counts);
}

inline void launch_nacl_select(const SelectArgs& a, cudaStream_t stream) {
  const int64_t rows = a.p.batch * a.p.heads;
  if (rows == 0) return;
  if (a.p.length <= kShortRow) {
    TENFOLD_LAUNCH(nacl_select_kernel<kShortRowThreads>, static_cast<unsigned>(rows),
                   kShortRowThreads, stream, a);
  } else {
    TENFOLD_LAUNCH(nacl_select_kernel<kLongRowThreads>, static_cast<unsigned>(rows),
                   kLongRowThreads, stream, a);
  }
}

}  // namespace tenfold::cuda
