// SPDX-License-Identifier: Apache-2.0
// Key tiles of proxy_scores multiplied by AMX. The products of the next tile run beside the vector
// work on this one, a few keys after every few products: the two use different units, but the
// out-of-order window is too small to overlap them if they are not interleaved.
#pragma once

#include "kv_eviction/cpu/proxy_scores_tile.h"

#if defined(TENFOLD_ISA_AMX)
TENFOLD_ISA_BEGIN
namespace {

static_assert(kTileRows == kAmxBlock && kDotKeys == kAmxBlock);
constexpr int kChunk = 4;  // keys that are used at a time

// Splits the keys [first, last) for the block's row tiles.
inline void split_keys(KeySource& s, int64_t first, int64_t last) {
  const int64_t bytes = split_panel_bytes(s.depth);
  s.first = first;
  char* panel = s.panels;
  uint32_t* unsplit = s.unsplit;
  for (int64_t j0 = first; j0 < last; j0 += kDotKeys, panel += bytes) {
    const int64_t left = s.length - j0;
    const int n = static_cast<int>(left < kDotKeys ? left : kDotKeys);
    const float* row = static_cast<const float*>(s.k) + j0 * s.stride;
    if (n < kDotKeys) __builtin_memset(panel, 0, bytes);
    uint32_t bad = 0;
    for (int j = 0; j < n; ++j, row += s.stride)
      bad |= static_cast<uint32_t>(!split_left(row, s.depth, j, panel)) << j;
    *unsplit++ = bad;
  }
}

// The logits of keys and rows that cannot be split (inf, NaN, near the largest float), one by one;
// so no logit depends on what lies beside it.
__attribute__((noinline)) void plain_logits(const KeySource& s, const PackedRows& rows, int64_t j0,
                                            uint32_t keys, float* sums) {
  const int64_t left = s.length - j0;
  const VF scale = set1(rows.scale);
  for (int j = 0; j < kDotKeys && j < left; ++j)
    for (int r = 0; r < kTileRows; ++r) {
      if ((keys >> j & 1) == 0 && (rows.unsplit >> r & 1) == 0) continue;
      const float* k = static_cast<const float*>(s.k) + (j0 + j) * s.stride;
      const auto* q = static_cast<const float*>(rows.row[r]);
      VF sum = set1(0.0f);
      int64_t i = 0;
      for (; i + kWidth <= s.depth; i += kWidth) sum = fma(load(q + i) * scale, load(k + i), sum);
      float logit = hsum(sum);
      for (; i < s.depth; ++i) logit += q[i] * rows.scale * k[i];
      sums[j * kTileRows + r] = logit;
    }
}

template <class Between>
inline void dot_product(const bf16_t* k, int64_t stride, const float* q, int64_t d,
                        const Between& between) {
  constexpr int64_t kPitch = kTileRows * 4;  // bytes of a row of pairs
  const auto* pairs = reinterpret_cast<const char*>(q);
  const bf16_t* k1 = k + kAmxRows * stride;
  amx_zero();
  for (int64_t i = 0; i < d; i += kAmxDepth, pairs += kAmxRows * kPitch) {
    _tile_loadd(4, k + i, stride * 2);
    _tile_loadd(6, pairs, kPitch);
    _tile_loadd(7, pairs + 64, kPitch);
    _tile_loadd(5, k1 + i, stride * 2);
    amx_multiply();
    between();
  }
}

// Multiplies the tile from j0 on; between() is called after every amx_multiply().
template <Product P, class Between>
inline void amx_logits(const KeySource& s, const PackedRows& rows, int64_t j0, VF (*acc)[kVecs],
                       const Between& between) {
  auto* const sums = reinterpret_cast<float*>(acc);
  if constexpr (P == Product::dot) {
    int64_t pitch;
    const bf16_t* k = bf16_rows(s, j0, &pitch);
    amx_fence();
    dot_product(k, pitch, rows.packed, round_up(s.depth, kDotDepth), between);
    amx_store(sums);
  } else {
    const int64_t tile = (j0 - s.first) / kDotKeys;
    amx_fence();
    split_product(s.panels + tile * split_panel_bytes(s.depth),
                  reinterpret_cast<const char*>(rows.packed), split_steps(s.depth), between);
    amx_store(sums);
    if ((s.unsplit[tile] | rows.unsplit) != 0) [[unlikely]]
      plain_logits(s, rows, j0, s.unsplit[tile], sums);
  }
}

inline void fetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
}

// Keys that will be needed soon: a tile of bf16 rows, or a few keys of the next block to be split.
template <Product P>
inline void fetch_keys(KeySource& s, int64_t j0) {
  const auto* k = static_cast<const char*>(s.k);
  if constexpr (P == Product::dot) {
    if (j0 + kDotKeys > s.length) return;
    for (int j = 0; j < kDotKeys; ++j) fetch_row(k + (j0 + j) * s.stride * 2, s.depth * 2);
  } else {
    for (int64_t j = 0; j < s.fetch_step && s.fetch < s.fetch_end; ++j, ++s.fetch)
      fetch_row(k + s.fetch * s.stride * 4, s.depth * 4);
  }
}

// The vector work on a tile, in kChunks pieces, is done one or two tiles after its products: loads
// from a tile that was just stored have to wait (two are better for split products, whose last
// group ends late; they cost more of L1).
template <Product P, class Pairs, class Use>
inline void for_amx_pairs(KeySource& s, Pairs pairs, Use& use) {
  constexpr int kChunks = kDotKeys / kChunk, kDelay = P == Product::dot ? 1 : 2;
  const int products =
      static_cast<int>(split_steps(s.depth)) * (P == Product::dot ? 1 : kSplitProducts);
  alignas(64) VF acc[kDelay + 1][kDotKeys][kVecs];
  Pairs ahead = pairs;
  int to = 0, from = 0;
  const auto advance = [](int& i) { i = i == kDelay ? 0 : i + 1; };
  for (; to < kDelay && ahead; ++to, ahead.next())
    amx_logits<P>(s, ahead.member().packed, ahead.key(), acc[to], [] {});
  for (; pairs; pairs.next(), advance(from)) {
    int64_t key = pairs.key();
    VF(*now)[kVecs] = acc[from];
    VF(*const end)[kVecs] = now + kDotKeys;
    use.start(pairs.member(), key, now);
    const auto some = [&]() __attribute__((always_inline)) {
      use.template keys<kChunk>(key, now);
      key += kChunk;
      now += kChunk;
    };
    int credit = 0;
    const auto between = [&]() __attribute__((always_inline)) {
      for (credit += kChunks; credit >= products; credit -= products) some();
    };
    if (ahead) {
      fetch_keys<P>(s, ahead.key() + kDotKeys);
      amx_logits<P>(s, ahead.member().packed, ahead.key(), acc[to], between);
      ahead.next();
      advance(to);
    }
    while (now < end) some();
    use.finish();
  }
}

}  // namespace
TENFOLD_ISA_END
#endif
