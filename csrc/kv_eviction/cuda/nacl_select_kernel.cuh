// Device code of nacl_select: one block per (sequence, head). Keys (sortable scores, then noisy
// logits) are written once to a workspace; a radix selection reads them in passes of 8 bits, most
// significant first. Slots break ties: only if the boundary key is shared, 4 more passes over the
// slots of that key follow. An ordered compaction writes the chosen slots.
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

constexpr int kSelectThreads = 256;

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

template <class KeyAt>
__device__ inline Digit select_digit(KeyAt key_at, int64_t n, uint32_t prefix, int shift,
                                     int64_t wanted, uint32_t* histogram, int64_t* result) {
  for (int i = threadIdx.x; i < 256; i += kSelectThreads) histogram[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kSelectThreads) {
    uint32_t key;
    if (!key_at(i, &key)) continue;
    const bool same = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);
    if (same) atomicAdd(&histogram[(key >> shift) & 0xFFu], 1u);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int bin = 255;
    while (bin > 0 && histogram[bin] < wanted) wanted -= histogram[bin--];
    result[0] = bin;
    result[1] = wanted;
    result[2] = histogram[bin];
  }
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

__device__ inline SlotCut radix_cut(const uint32_t* keys, int64_t n, int64_t wanted,
                                    uint32_t* histogram, int64_t* result) {
  uint32_t prefix = 0;
  int64_t in_bin = 0;
  const auto by_key = [&](int64_t i, uint32_t* key) {
    *key = keys[i];
    return keys[i] != 0;
  };
  for (int shift = 24; shift >= 0; shift -= 8) {
    const Digit d = select_digit(by_key, n, prefix, shift, wanted, histogram, result);
    prefix |= d.bin << shift;
    wanted = d.wanted;
    in_bin = d.in_bin;
  }
  if (in_bin == wanted) return {prefix, n};
  // Ties: the wanted lowest slots, that is the wanted largest complements.
  uint32_t complement = 0;
  const auto by_slot = [&](int64_t i, uint32_t* key) {
    *key = ~static_cast<uint32_t>(i);
    return keys[i] == prefix;
  };
  for (int shift = 24; shift >= 0; shift -= 8) {
    const Digit d = select_digit(by_slot, n, complement, shift, wanted, histogram, result);
    complement |= d.bin << shift;
    wanted = d.wanted;
  }
  return {prefix, static_cast<int64_t>(~complement)};
}

__device__ inline bool chosen(uint32_t key, int64_t i, SlotCut cut) {
  return key > cut.key || (key == cut.key && i <= cut.slot);
}

// Number of set flags before this thread in the block, and in the whole block.
__device__ inline int64_t block_rank(bool flag, int* warp_counts, int64_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(0xFFFFFFFFu, flag);
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int64_t before = __popc(votes & ((1u << lane) - 1u)), all = 0;
  for (int w = 0; w < kSelectThreads / 32; ++w) {
    if (w < warp) before += warp_counts[w];
    all += warp_counts[w];
  }
  __syncthreads();
  *total = all;
  return before;
}

__global__ void __launch_bounds__(kSelectThreads) nacl_select_kernel(SelectArgs a) {
  TENFOLD_SHARED(uint32_t, histogram, 256);
  TENFOLD_SHARED(int64_t, result, 3);
  TENFOLD_SHARED(int, warp_counts, kSelectThreads / 32);
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
  for (int64_t i = used + threadIdx.x; i < p.width; i += kSelectThreads) out[i] = -1;
  if (threadIdx.x == 0 && (p.counts_per_head || h == 0))
    a.new_lens[p.counts_per_head ? row : b] = static_cast<int32_t>(used);
  if (n <= total) {
    for (int64_t i = threadIdx.x; i < n; i += kSelectThreads) out[i] = begin + i;
    return;
  }
  const int64_t first = begin + c[0], m = n - c[0] - c[1];
  const float* scores = a.scores + row * p.length + first;
  uint32_t* keys = a.keys + row * p.length;
  for (int64_t i = threadIdx.x; i < m; i += kSelectThreads)
    keys[i] = sortable_key(pooled_score(p, scores, m, i));
  __syncthreads();
  SlotCut top{0xFFFFFFFFu, -1};
  if (c[2] > 0) top = radix_cut(keys, m, c[2], histogram, result);
  // From here on keys are those of the draw; 0 (no float's key) marks what is kept already.
  const uint32_t row_id = a.row_id.given() ? static_cast<uint32_t>(a.row_id[b]) : 0u;
  for (int64_t i = threadIdx.x; i < m; i += kSelectThreads) {
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
  if (c[3] > 0) drawn = radix_cut(keys, m, c[3], histogram, result);
  for (int64_t i = threadIdx.x; i < c[0]; i += kSelectThreads) out[i] = begin + i;
  int64_t filled = c[0];
  for (int64_t i0 = 0; i0 < m; i0 += kSelectThreads) {
    const int64_t i = i0 + threadIdx.x;
    const bool keep = i < m && (keys[i] == 0 || (c[3] > 0 && chosen(keys[i], i, drawn)));
    int64_t all;
    const int64_t rank = block_rank(keep, warp_counts, &all);
    if (keep) out[filled + rank] = first + i;
    filled += all;
  }
  for (int64_t i = threadIdx.x; i < c[1]; i += kSelectThreads)
    out[filled + i] = begin + n - c[1] + i;
}

inline void launch_nacl_select(const SelectArgs& a, cudaStream_t stream) {
  const int64_t rows = a.p.batch * a.p.heads;
  if (rows > 0)
    TENFOLD_LAUNCH(nacl_select_kernel, static_cast<unsigned>(rows), kSelectThreads, stream, a);
}

}  // namespace tenfold::cuda
