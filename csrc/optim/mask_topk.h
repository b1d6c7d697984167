// SPDX-License-Identifier: Apache-2.0
// mask_topk, mask_random: a packed mask with exactly k = floor(fraction * n) set bits.
//
//   mask_topk(score, fraction)                    the k largest scores of the flattened tensor
//   mask_random(like, n, fraction, seed, stream)  the k largest of n random words
//
// Scores compare as torch.topk compares them: NaN above +inf, -0 = +0; equal ones by index, the
// lower first. The random word of position i is word i % 4 of Philox4x32-10 at counter
// (i / 4 low, i / 4 high, stream low, stream high) with key seed, so a draw depends on nothing
// else.
//
// Both become uint32 keys in the same order, and the mask is key > cut, or key = cut and among the
// first `ties` of those. On the CPU the cut is found in one pass over the scores, mostly: a
// sample gives two keys between which it lies almost surely; the pass marks what is above both,
// and notes the few in between, among which the cut is then found exactly. If it turns out to lie
// elsewhere, or the keys repeat so often that there are too many in between, a radix selection of
// three passes finds it.
// Traffic: the scores once, the mask once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"
#include "core/philox.h"
#include "core/types.h"

namespace tenfold {

// Where keys come from.
struct KeySource {
  const void* score;  // n scores, or null: random words
  Dtype dtype;
  uint32_t seed_lo, seed_hi, stream_lo, stream_hi;
};

static inline KeySource random_source(int64_t seed_bits, int64_t stream_bits) {
  const auto seed = static_cast<uint64_t>(seed_bits), stream = static_cast<uint64_t>(stream_bits);
  return {nullptr,
          Dtype::f32,
          static_cast<uint32_t>(seed),
          static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(stream),
          static_cast<uint32_t>(stream >> 32)};
}

constexpr uint32_t kNanKey = 0xFFFFFFFFu;

// Order-preserving image of a score; all NaN are equal and the largest, -0 is +0.
TENFOLD_HD uint32_t score_key(uint32_t float_bits) {
  const uint32_t magnitude = float_bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kNanKey;
  if (magnitude == 0) return 0x80000000u;
  return (float_bits >> 31) != 0 ? ~float_bits : float_bits | 0x80000000u;
}

TENFOLD_HD uint32_t random_key(const KeySource& s, int64_t i) {
  const auto counter = static_cast<uint64_t>(i) >> 2;
  const Philox4 words =
      philox4x32_10(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                    s.stream_lo, s.stream_hi, s.seed_lo, s.seed_hi);
  return words.word[i & 3];
}

constexpr int64_t kKeyBlock = 4096;  // keys at a time, in L1
constexpr int kKeyBits = 11, kKeyBins = 1 << kKeyBits;

// A range of keys: first .. first + width - 1; width 0: all up to the largest.
struct KeyRange {
  uint32_t first, width;
};

// Keys of the elements [begin, begin + n), n <= kKeyBlock, begin a multiple of 64. `keys` has room
// for a multiple of 64.
TENFOLD_ISA_DECLARE(void topk_keys(const KeySource& source, int64_t begin, int64_t n,
                                   uint32_t* keys))
// keys[j] = the key of element at[j].
TENFOLD_ISA_DECLARE(void topk_sample(const KeySource& source, const int64_t* at, int64_t n,
                                     uint32_t* keys))
// Bits of the n keys above `range`; keys and positions of those inside go to `inside` and `at`,
// which have room for 64 more than that. Returns how many those are.
TENFOLD_ISA_DECLARE(int64_t topk_mark(const uint32_t* keys, int64_t n, KeyRange range,
                                      uint8_t* bits, int64_t* above, uint32_t* inside,
                                      uint32_t* at))
// ++bins[(key - range.first) >> shift] for the keys inside the range. bins: 4 x kKeyBins, whose sum
// counts.
TENFOLD_ISA_DECLARE(void topk_histogram(const uint32_t* keys, int64_t n, KeyRange range, int shift,
                                        uint32_t* bins))
// How many keys equal `key`, and in *above how many more are above it.
TENFOLD_ISA_DECLARE(int64_t topk_count(const uint32_t* keys, int64_t n, uint32_t key,
                                       int64_t* above))
// Bits of the keys above `cut` and of the first `ties` of those equal to it; returns the ties left.
TENFOLD_ISA_DECLARE(int64_t topk_write(const uint32_t* keys, int64_t n, uint32_t cut, int64_t ties,
                                       uint8_t* bits))

}  // namespace tenfold
