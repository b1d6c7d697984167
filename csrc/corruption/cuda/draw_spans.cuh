// SPDX-License-Identifier: Apache-2.0
// The mask of a row, drawn by its block as corruption/spans.h defines it. Floyd's algorithm asks of
// each draw whether its value has been chosen before. It has if an earlier draw has the same value,
// or if it is the number that an earlier step chose in place of its draw; that step is known from
// the value, so each thread answers for its own draws, after a walk that is seldom longer than one
// step.
#pragma once

#include "corruption/cuda/row_bits.cuh"
#include "corruption/spans.h"

namespace tenfold::cuda {

// Working memory of a row of up to n tokens, in int32: of the draws, of the latest steps and bits
// of the gaps, of ranks of bits, and of cuts.
struct DrawMemory {
  int32_t *draws, *steps, *ranks, *noise_cuts, *kept_cuts;
  uint32_t* gaps;

  __device__ DrawMemory(int32_t* at, int64_t n) {
    const int64_t half = n / 2 + 1, words = bit_words(n);
    draws = at, steps = draws + half, ranks = steps + n, noise_cuts = ranks + words;
    kept_cuts = noise_cuts + half, gaps = reinterpret_cast<uint32_t*>(kept_cuts + half);
  }
};
TENFOLD_HD int64_t draw_memory_ints(int64_t n) {
  return 3 * (n / 2 + 1) + n + 2 * bit_words(n);
}

// Whether the draw of a step had been chosen before it. latest[v]: k - the first step that drew v.
__device__ inline bool drawn_before(const int32_t* draws, const int32_t* latest, int64_t k,
                                    int64_t first, int64_t step) {
  for (;;) {
    const int64_t drawn = draws[step];
    if (k - latest[drawn] < step) return true;
    if (drawn < first || drawn - first >= step) return false;
    step = drawn - first;  // chose `drawn` if its own draw had been chosen before
  }
}

// Where the parts end that `total` tokens are cut into. Ends with a barrier.
__device__ inline void block_cuts(const SpanStream& s, uint32_t part, int64_t total, int64_t parts,
                                  const DrawMemory& m, int64_t* sums, int32_t* cuts) {
  const int64_t k = parts - 1, gaps = total - 1, first = gaps - k, words = bit_words(gaps);
  if (threadIdx.x == 0) cuts[k] = static_cast<int32_t>(total);
  if (k > 0) {
    block_fill(m.steps, gaps, 0);
    block_fill(m.gaps, words, 0u);
    __syncthreads();
    for (int64_t block = threadIdx.x; 4 * block < k; block += kSpanThreads) {
      const Philox4 w = span_words(s, static_cast<uint32_t>(block), part);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t i = 4 * block + j;
        if (i >= k) break;
        const auto bound = static_cast<uint32_t>(first + i + 1);
        const uint32_t drawn = draw_below(s, static_cast<uint32_t>(i), part, bound, w.word[j]);
        m.draws[i] = static_cast<int32_t>(drawn);
        atomicMax(&m.steps[drawn], static_cast<int32_t>(k - i));
      }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < k; i += kSpanThreads) {
      const bool before = drawn_before(m.draws, m.steps, k, first, i);
      set_bit(m.gaps, before ? first + i : m.draws[i]);
    }
    __syncthreads();
    block_ranks(words, m.ranks, sums, [&](int64_t w) { return int64_t{__popc(m.gaps[w])}; });
    for (int64_t w = threadIdx.x; w < words; w += kSpanThreads) {
      int64_t rank = m.ranks[w];
      for (uint32_t bits = m.gaps[w]; bits != 0; bits &= bits - 1)
        cuts[rank++] = static_cast<int32_t>(32 * w + lowest_bit(bits) + 1);
    }
  }
  __syncthreads();
}

// mask: bits of the row. Begins and ends with a barrier.
__device__ inline void block_draw(const SpanRule& rule, const SpanStream& s, bool roll, int64_t n,
                                  const DrawMemory& m, int64_t* sums, uint32_t* mask) {
  const SpanCounts c = span_counts(rule, n);
  block_fill(mask, bit_words(n), 0u);
  __syncthreads();
  if (c.spans == 0) return;
  block_cuts(s, kNoiseGaps, c.noise, c.spans, m, sums, m.noise_cuts);
  block_cuts(s, kKeptGaps, n - c.noise, c.spans, m, sums, m.kept_cuts);
  const int64_t shift = roll ? draw_roll(s, n) : 0;
  for (int64_t j = threadIdx.x; j < c.spans; j += kSpanThreads) {
    const int64_t kept = m.kept_cuts[j];
    for (int64_t i = j > 0 ? m.noise_cuts[j - 1] : 0; i < m.noise_cuts[j]; ++i) {
      const int64_t at = kept + i + shift;
      set_bit(mask, at < n ? at : at - n);
    }
  }
  __syncthreads();
}

}  // namespace tenfold::cuda
