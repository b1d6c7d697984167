// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/vec.h"
#include "optim/mask_bits.h"

TENFOLD_ISA_BEGIN
namespace {

inline uint64_t word_at(const uint8_t* bits) {
  uint64_t word;
  __builtin_memcpy(&word, bits, 8);
  return word;
}

inline int64_t popcount(uint64_t word) {
#if defined(TENFOLD_ISA_AVX2) || defined(TENFOLD_ISA_AVX512)
  return __builtin_popcountll(word);
#else  // no instruction for it
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
  return static_cast<int64_t>(word * 0x0101010101010101u >> 56);
#endif
}

inline int64_t count(const uint8_t* bits, int64_t bytes) {
  int64_t sum[4] = {};
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32)
    for (int k = 0; k < 4; ++k) sum[k] += popcount(word_at(bits + i + 8 * k));
  for (; i + 8 <= bytes; i += 8) sum[0] += popcount(word_at(bits + i));
  uint64_t rest = 0;
  for (int k = 0; i + k < bytes; ++k) rest |= static_cast<uint64_t>(bits[i + k]) << (8 * k);
  return sum[0] + sum[1] + sum[2] + sum[3] + popcount(rest);
}

}  // namespace

void mask_pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const uint64_t word = bits_of_bytes(bytes + i);
    __builtin_memcpy(bits + i / 8, &word, 8);
  }
  if (i == n) return;
  uint8_t rest[64] = {};
  __builtin_memcpy(rest, bytes + i, static_cast<uint64_t>(n - i));
  const uint64_t word = bits_of_bytes(rest);
  __builtin_memcpy(bits + i / 8, &word, static_cast<uint64_t>((n - i + 7) / 8));
}

void mask_unpack(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) store_bits_as_bytes(bytes + i, word_at(bits + i / 8));
  if (i == n) return;
  uint64_t word = 0;
  __builtin_memcpy(&word, bits + i / 8, static_cast<uint64_t>((n - i + 7) / 8));
  uint8_t rest[64];
  store_bits_as_bytes(rest, word);
  __builtin_memcpy(bytes + i, rest, static_cast<uint64_t>(n - i));
}

int64_t mask_count(const uint8_t* bits, int64_t bytes) {
  return count(bits, bytes);
}

void mask_prefix_steps(const uint8_t* bits, int64_t bytes, int64_t step, int32_t before,
                       int32_t* prefix) {
  int64_t at = 0;
  if (step == 32) {  // the default, without the loop over a step
    for (; at + 32 <= bytes; at += 32) {
      *prefix++ = before;
      const int64_t low = popcount(word_at(bits + at)) + popcount(word_at(bits + at + 8));
      const int64_t high = popcount(word_at(bits + at + 16)) + popcount(word_at(bits + at + 24));
      before += static_cast<int32_t>(low + high);
    }
  }
  for (; at < bytes; at += step) {
    *prefix++ = before;
    before += static_cast<int32_t>(count(bits + at, bytes - at < step ? bytes - at : step));
  }
}

TENFOLD_ISA_END
