// SPDX-License-Identifier: Apache-2.0
// The K largest logits of a group of lanes by sorting networks. A key is an integer that sorts as
// the logit does, with the expert in the place of its last bits (counted from the end: of equal
// ones the lower index is the larger key). An exchange of keys takes a maximum and a minimum,
// where one of logits with their experts takes three instructions more. For ISA sources.
#pragma once

#include "moe/cpu/token_tile.h"

TENFOLD_ISA_BEGIN
namespace {

inline void exchange(VI* a, VI* b) {
  const VI larger = signed_max(*a, *b);
  *b = signed_min(*a, *b);
  *a = larger;
}

// Batcher's networks: falling order.
template <int K>
inline void sort_keys(VI* a) {
  if constexpr (K == 16) {
    sort_keys<8>(a);
    sort_keys<8>(a + 8);
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) exchange(a + i, a + i + 8);
#pragma GCC unroll 16
    for (int i = 4; i < 8; ++i) exchange(a + i, a + i + 4);
#pragma GCC unroll 16
    for (int i = 2; i < 14; i += 4) {
      exchange(a + i, a + i + 2);
      exchange(a + i + 1, a + i + 3);
    }
#pragma GCC unroll 16
    for (int i = 1; i < 15; i += 2) exchange(a + i, a + i + 1);
  } else if constexpr (K == 8) {
    sort_keys<4>(a);
    sort_keys<4>(a + 4);
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) exchange(a + i, a + i + 4);
    exchange(a + 2, a + 4);
    exchange(a + 3, a + 5);
#pragma GCC unroll 16
    for (int i = 1; i < 7; i += 2) exchange(a + i, a + i + 1);
  } else {
    static_assert(K == 4);
    exchange(a, a + 1);
    exchange(a + 2, a + 3);
    exchange(a, a + 2);
    exchange(a + 1, a + 3);
    exchange(a + 1, a + 2);
  }
}

// The K largest of two sorted lists, sorted; and the largest of what is left out of all so far.
template <int K>
inline void merge_keys(VI* top, const VI* more, VI* next) {
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) {
    *next = signed_max(*next, signed_min(top[i], more[K - 1 - i]));
    top[i] = signed_max(top[i], more[K - 1 - i]);
  }
#pragma GCC unroll 4
  for (int by = K / 2; by > 0; by /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i)
      if ((i & by) == 0) exchange(top + i, top + i + by);
}

// Experts that a key has room for, beside bits enough for logits that are not equal to differ: with
// more, or a longer list, keys tie too often for what is saved (of groups of 16 float32 rows from a
// normal distribution 18 % with 1024 experts and 8 of them, 52 % with 16).
constexpr int64_t most_keyed(int64_t k) {
  return k > 8 ? 256 : 1024;
}

// Keys of a group of lanes.
template <int K>
struct TopKeys {
  VI top[K];  // in falling order
  VI next;    // the largest of the others
  VI low;     // bits of the expert
  VF finite;  // NaN where a logit is not

  TopKeys(const float* lanes, int64_t n) {
    uint32_t ids = 1;
    while (ids < n) ids *= 2;
    low = seti(ids - 1);
    const VI keep = seti(~(ids - 1)), one = seti(1), least = seti(0x80000000u);
    VI id = low;
    finite = set1(0.0f);
    next = least;
    const auto key = [&](int64_t e) {
      const VF x = load(lanes + e * kGateTokens);
      finite = fma(x, set1(0.0f), finite);
      const VI made = (ordered(x) & keep) | id;
      id = id - one;
      return made;
    };
    const auto some = [&](int64_t from, VI* a) {  // the last ones
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) a[j] = from + j < n ? key(from + j) : least;
      sort_keys<K>(a);
    };
    if (n < K) {
      some(0, top);
      return;
    }
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) top[j] = key(j);
    sort_keys<K>(top);
    int64_t e = K;
    VI more[K];
    for (; e + K <= n; e += K) {
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) more[j] = key(e + j);
      sort_keys<K>(more);
      merge_keys<K>(top, more, &next);
    }
    if (e == n) return;
    some(e, more);
    merge_keys<K>(top, more, &next);
  }

  VI expert(int j) const { return low - (top[j] & low); }
  // Of the first k and the one that follows, the lanes where two may differ in their experts only.
  VM tied(int64_t k) const {
    VI apart = seti(0xFFFFFFFFu);
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j)
      if (j < k) apart = unsigned_min(apart, top[j] ^ (j + 1 < K ? top[j + 1] : next));
    return above(low + seti(1), apart);
  }
};

// Whether no lane has a logit with bits in the place of the expert.
inline bool fits_keys(const float* lanes, int64_t n, VI low) {
  VI found = seti(0);
  for (int64_t e = 0; e < n; ++e) found = found | ordered(load(lanes + e * kGateTokens));
  return !any(above(found & low, seti(0)));
}

// NaN becomes -inf; NaN where there was one.
inline VF replace_nan(float* lanes, int64_t n) {
  VF poison = set1(0.0f);
  for (int64_t e = 0; e < n; ++e) {
    const VF x = load(lanes + e * kGateTokens);
    poison = select(unordered(x), x, poison);
  }
  if (!any(unordered(poison))) return poison;
  for (int64_t e = 0; e < n; ++e) {
    float* const at = lanes + e * kGateTokens;
    store(at, vmax(load(at), from_bits(seti(0xFF800000u))));
  }
  return poison;
}

}  // namespace
TENFOLD_ISA_END
