// SPDX-License-Identifier: Apache-2.0
// The dropout of attention weights that lie as an accumulator of core/mma_tile.cuh. A block of
// Philox holds the words of four neighbouring keys of a query: each is drawn by one lane, which
// tells the others.
#pragma once

#include "attention/dha_attention.h"
#include "core/mma_tile.cuh"
#include "core/philox.h"

namespace tenfold::cuda {

// Which words of a block say `keep`, bit by bit.
__device__ inline uint32_t kept_words(const AttentionDropout& drop, uint32_t sequence_head,
                                      int64_t query, int64_t key) {
  const Philox4 four = philox4x32_10(static_cast<uint32_t>(key / 4), static_cast<uint32_t>(query),
                                     sequence_head, drop.offset, drop.key[0], drop.key[1]);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (four.word[i] >= drop.below) bits |= 1u << i;
  return bits;
}

// Which weights of the warp's rows from row0 and the columns from col0 on are kept: bit
// ((2 m + half) kN + n) 2 + i for acc[m][n][2 half + i]. All lanes call it. kRowsAreQueries: else
// rows are keys and columns queries. row0 and col0 are multiples of 8.
template <bool kRowsAreQueries, int kM, int kN>
__device__ inline uint64_t draw_kept(const AttentionDropout& drop, uint32_t sequence_head,
                                     int64_t row0, int64_t col0) {
  static_assert(4 * kM * kN <= 64 && kN % 2 == 0);
  const int lane = threadIdx.x % 32;
  uint64_t keep = 0;
#pragma unroll 1  // else its rounds hold too many registers
  for (int at = 0; at < kM * kN; ++at) {
    const int row = at / (kN / 2), pair = at % (kN / 2);  // four weights: n = 2 pair and the next
    const int64_t own = row0 + 8 * row + lane / 4, first = col0 + 16 * pair;
    uint32_t four;
    if constexpr (kRowsAreQueries) {
      // Two lanes have a block's halves, so the even one draws for the first n, the odd for the
      // second.
      const int odd = lane % 2;
      const uint32_t bits =
          kept_words(drop, sequence_head, own, first + 8 * odd + lane % 4 / 2 * 4);
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, bits, 1);
      four = odd != 0 ? other >> 2 | (bits & 12u) : (bits & 3u) | (other & 3u) << 2;
    } else {
      // Four lanes have a word each of a block, in each of their four columns: one column a lane.
      const int mine = lane / 4 % 4;
      const int64_t query = first + mine / 2 * 8 + lane % 4 * 2 + mine % 2;
      uint32_t bits = kept_words(drop, sequence_head, query, own) << 4 * mine;
      bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 4);
      bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 8);
      bits >>= mine;
      four = (bits & 1u) | (bits >> 3 & 2u) | (bits >> 6 & 4u) | (bits >> 9 & 8u);
    }
    keep |= static_cast<uint64_t>(four) << 4 * at;
  }
  return keep;
}

// What was dropped becomes 0, the rest larger.
template <int kM, int kN>
__device__ inline void drop_weights(const AttentionDropout& drop, uint64_t keep,
                                    float (&x)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = ((2 * m + half) * kN + n) * 2 + i;
          x[m][n][2 * half + i] *= (keep >> at & 1) != 0 ? drop.scale : 0.0f;
        }
}

}  // namespace tenfold::cuda
