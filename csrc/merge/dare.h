// SPDX-License-Identifier: Apache-2.0
// Which elements DARE drops (arXiv 2311.03099): a pure function of seed, tensor, expert and
// position.
//
// Element i of a tensor (flattened, row-major, counted from the start of the whole tensor), expert
// number s in the list, drop rate p, seed (64 bits), stream (64 bits, of the tensor's name):
//
//   t = round(p * 2^40), at most 2^40 - 1;  high = t >> 32, low = t mod 2^32
//   u = byte i mod 16 of Philox4x32-10 at counter (i >> 4 low, word(i >> 4, s, 0), stream low,
//       stream high) with key seed; bytes of a word from the least significant one up
//   v = word i mod 4 of Philox4x32-10 at counter (i >> 2 low, word(i >> 2, s, 1), stream low,
//       stream high) with the same key
//   word(n, s, r) = (n >> 32) | r << 15 | s << 16
//   dropped  <=>  u < high, or u = high and v < low
//
// So one Philox call decides about 16 elements, and only one element in 256 needs a second one
// (none where p is a multiple of 1 / 256). The rate is exact to 2^-41.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/philox.h"

namespace tenfold {

constexpr int kMaxExperts = 64;
constexpr int64_t kMaxElements = int64_t{1} << 49;  // i >> 2 has 47 bits in a counter

// Drop rate as a 40-bit limit.
struct DropLimit {
  uint32_t high, low;
};

static inline DropLimit drop_limit(double drop) {
  constexpr double kSteps = 1099511627776.0;  // 2^40
  const double limit = drop * kSteps + 0.5;
  const auto t = limit >= kSteps ? (uint64_t{1} << 40) - 1 : static_cast<uint64_t>(limit);
  return {static_cast<uint32_t>(t >> 32), static_cast<uint32_t>(t)};
}

struct DropKey {
  uint32_t seed_lo, seed_hi, stream_lo, stream_hi;
};

static inline DropKey drop_key(int64_t seed_bits, int64_t stream_bits) {
  const auto seed = static_cast<uint64_t>(seed_bits), stream = static_cast<uint64_t>(stream_bits);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
}

// The second word of a counter.
TENFOLD_HD uint32_t drop_word(uint64_t n, uint32_t expert, uint32_t refining) {
  return static_cast<uint32_t>(n >> 32) | refining << 15 | expert << 16;
}

// The four words whose 16 bytes decide about elements 16 n .. 16 n + 15.
TENFOLD_HD Philox4 drop_words(const DropKey& key, uint64_t n, uint32_t expert) {
  return philox4x32_10(static_cast<uint32_t>(n), drop_word(n, expert, 0), key.stream_lo,
                       key.stream_hi, key.seed_lo, key.seed_hi);
}

// For an element whose byte equals limit.high.
TENFOLD_HD bool drop_by_second_draw(const DropKey& key, uint64_t i, uint32_t expert,
                                    DropLimit limit) {
  const uint64_t n = i >> 2;
  const Philox4 words = philox4x32_10(static_cast<uint32_t>(n), drop_word(n, expert, 1),
                                      key.stream_lo, key.stream_hi, key.seed_lo, key.seed_hi);
  return words.word[i & 3] < limit.low;
}

}  // namespace tenfold
