// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/math.h"
#include "optim/mask_topk.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kStep = 64;  // keys whose bits are one word of a mask

inline VI score_keys(VF x) {
  const VM nan = unordered(x);
  const VI b = bits(x + set1(0.0f));  // -0 + 0 = +0
  const VI key = b ^ (shr_signed<31>(b) | seti(0x80000000u));
  return select(nan, seti(kNanKey), key);
}

template <class T>
void score_block(const T* score, int64_t n, uint32_t* keys) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(keys + i, score_keys(load(score + i)));
  if (i < n) store(keys + i, score_keys(load_n(score + i, static_cast<int>(n - i))));
}

void random_block(const KeySource& s, int64_t begin, int64_t n, uint32_t* keys) {
  const VI lanes = counter_lanes();
  for (int64_t i = 0; i < n; i += 4 * kWidth) {
    const auto first = static_cast<uint64_t>(begin + i) >> 2;  // a multiple of kWidth: no carry
    VI x[4] = {seti(static_cast<uint32_t>(first)) + lanes, seti(static_cast<uint32_t>(first >> 32)),
               seti(s.stream_lo), seti(s.stream_hi)};
    philox_rounds(x, s.seed_lo, s.seed_hi);
    store_by_four(keys + i, x[0], x[1], x[2], x[3]);
  }
}

inline uint64_t above_bits(const uint32_t* keys, VI limit) {
  uint64_t word = 0;
  for (int k = 0; k < kStep; k += kWidth)
    word |= static_cast<uint64_t>(bits_of(above(load(keys + k), limit))) << k;
  return word;
}

inline uint64_t equal_bits(const uint32_t* keys, VI key) {
  uint64_t word = 0;
  for (int k = 0; k < kStep; k += kWidth)
    word |= static_cast<uint64_t>(bits_of(eq(load(keys + k), key))) << k;
  return word;
}

inline uint64_t first_bits(int64_t n) {
  return n >= kStep ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

inline void put_bits(uint8_t* bits, int64_t i, int64_t n, uint64_t word) {
  const int64_t left = n - i;
  if (left >= kStep) {
    __builtin_memcpy(bits + i / 8, &word, 8);
  } else {
    __builtin_memcpy(bits + i / 8, &word, static_cast<uint64_t>((left + 7) / 8));
  }
}

}  // namespace

void topk_keys(const KeySource& source, int64_t begin, int64_t n, uint32_t* keys) {
  if (source.score == nullptr) return random_block(source, begin, n, keys);
  if (source.dtype == Dtype::f32)
    return score_block(static_cast<const float*>(source.score) + begin, n, keys);
  if (source.dtype == Dtype::bf16)
    return score_block(static_cast<const bf16_t*>(source.score) + begin, n, keys);
  score_block(static_cast<const fp16_t*>(source.score) + begin, n, keys);
}

void topk_sample(const KeySource& source, const int64_t* at, int64_t n, uint32_t* keys) {
  float values[kWidth];
  for (int64_t j = 0; j < n; j += kWidth) {
    const int count = static_cast<int>(n - j < kWidth ? n - j : kWidth);
    for (int i = 0; i < count; ++i) {
      const int64_t from = at[j + i];
      if (source.dtype == Dtype::f32) {
        values[i] = static_cast<const float*>(source.score)[from];
      } else if (source.dtype == Dtype::bf16) {
        store_n(values + i, load_n(static_cast<const bf16_t*>(source.score) + from, 1), 1);
      } else {
        store_n(values + i, load_n(static_cast<const fp16_t*>(source.score) + from, 1), 1);
      }
    }
    store_n(keys + j, score_keys(load_n(values, count)), count);
  }
}

int64_t topk_mark(const uint32_t* keys, int64_t n, KeyRange range, uint8_t* bits,
                  int64_t* num_above, uint32_t* inside, uint32_t* at) {
  const VI first = seti(range.first), last = seti(range.first + range.width - 1);
  const VI width = seti(range.width);
  int64_t count = 0, found = 0;
  for (int64_t i = 0; i < n; i += kStep) {
    const int64_t left = n - i;
    const uint64_t over = above_bits(keys + i, last) & first_bits(left);
    put_bits(bits, i, n, over);
    count += __builtin_popcountll(over);
    // No branch on whether a vector has any: it would be mispredicted every other time.
    for (int k = 0; k < kStep; k += kWidth) {
      const VI key = load(keys + i + k);
      VM in = above(width, key - first);
      if (left < kStep) in = both(in, lanes_of(static_cast<uint32_t>(first_bits(left) >> k)));
      store_chosen(inside + found, in, key);
      found += store_chosen(at + found, in, seti(static_cast<uint32_t>(i + k)) + iota());
    }
  }
  *num_above += count;
  return found;
}

void topk_histogram(const uint32_t* keys, int64_t n, KeyRange range, int shift, uint32_t* bins) {
  if (range.width == 0) {  // of all keys
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int c = 0; c < 4; ++c) ++bins[c * kKeyBins + (keys[i + c] >> shift)];
    for (; i < n; ++i) ++bins[keys[i] >> shift];
    return;
  }
  const VI first = seti(range.first), width = seti(range.width);
  uint32_t chosen[kKeyBlock + 16];
  int64_t count = 0, i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VI from_first = load(keys + i) - first;
    count += store_chosen(chosen + count, above(width, from_first), from_first);
  }
  for (; i < n; ++i)
    if (keys[i] - range.first < range.width) chosen[count++] = keys[i] - range.first;
  for (int64_t j = 0; j < count; ++j) ++bins[(j & 3) * kKeyBins + (chosen[j] >> shift)];
}

int64_t topk_count(const uint32_t* keys, int64_t n, uint32_t key, int64_t* num_above) {
  int64_t count = 0, over = 0;
  const VI wanted = seti(key);
  for (int64_t i = 0; i < n; i += kStep) {
    const uint64_t valid = first_bits(n - i);
    count += __builtin_popcountll(equal_bits(keys + i, wanted) & valid);
    over += __builtin_popcountll(above_bits(keys + i, wanted) & valid);
  }
  *num_above += over;
  return count;
}

int64_t topk_write(const uint32_t* keys, int64_t n, uint32_t cut, int64_t ties, uint8_t* bits) {
  const VI limit = seti(cut);
  for (int64_t i = 0; i < n; i += kStep) {
    const uint64_t valid = first_bits(n - i);
    uint64_t word = above_bits(keys + i, limit) & valid;
    if (ties > 0) {
      uint64_t same = equal_bits(keys + i, limit) & valid;
      if (__builtin_popcountll(same) <= ties) {
        ties -= __builtin_popcountll(same);
        word |= same;
      } else {
        for (; ties > 0; --ties, same &= same - 1) word |= same & -same;
      }
    }
    put_bits(bits, i, n, word);
  }
  return ties;
}

TENFOLD_ISA_END
