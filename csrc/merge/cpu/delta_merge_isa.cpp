// SPDX-License-Identifier: Apache-2.0
#include "merge/cpu/delta_sums.h"
#include "merge/cpu/drop_draws.h"
#include "merge/delta_merge.h"

TENFOLD_ISA_BEGIN
namespace {

// Lanes of the largest: above the cut, and the first of those equal to it. valid: bits of lanes.
inline VM pick_largest(VF d, uint32_t cut, uint32_t valid, int64_t* ties) {
  // A NaN's key may be lower here: still above that of infinity, and not above that of NaN.
  const VM over = above((bits(d) & seti(0x7FFFFFFFu)) + seti(1), seti(cut));
  if (*ties == 0) return over;
  uint32_t word = bits_of(over), same = bits_of(eq(magnitude_key(d), seti(cut))) & valid;
  const int64_t count = __builtin_popcount(same);
  if (count <= *ties) {
    *ties -= count;
    return lanes_of(word | same);
  }
  for (; *ties > 0; same &= same - 1, --*ties) word |= same & -same;
  return lanes_of(word);
}

// Elements i .. i + 2 kWidth - 1, of which the first is in vector `drawn` of the block of draws.
template <class T, Pick kPick, Mix kMix>
inline void merge_two(const DeltaMerge& m, int64_t i, int64_t drawn, const Draws& draws, bool past,
                      int64_t* ties) {
  constexpr bool kAll = kPick == Pick::all, kOrdered = kPick == Pick::largest;
  VF base[2], x[2];
  get_next_two<kOrdered>(static_cast<const T*>(m.base) + i, base);
  Sums<kMix> sums[2];
  const VM all = eq(base[0], base[0]);
  for (int e = 0; e < m.experts; ++e) {
    get_next_two<kOrdered>(static_cast<const T*>(m.expert[e]) + i, x);
    const VF weight = set1(m.weight[e]), share = set1(m.share[e]);
    for (int k = 0; k < 2; ++k) {
      const VF d = x[k] - base[k];
      VM kept = all;
      if constexpr (kPick == Pick::random) kept = draws.lanes(e, drawn + k);
      if constexpr (kPick == Pick::largest) kept = pick_largest(d, m.cut[e], ~0u, ties + e);
      sums[k].template add<kAll>(kept, d, weight, share);
    }
  }
  const VF lambda = set1(m.lambda);
  for (int k = 0; k < 2; ++k) x[k] = sums[k].result(base[k], lambda);
  put_two<kOrdered>(static_cast<T*>(m.out) + i, x, past);
}

// Elements i .. i + n - 1, n <= kWidth; the draw of the first is number `drawn` of the stretch.
template <class T, Pick kPick, Mix kMix>
__attribute__((noinline)) void merge_few(const DeltaMerge& m, int64_t i, int n, int64_t drawn,
                                         const Draws& draws, int64_t* ties) {
  const VF base = load_n(static_cast<const T*>(m.base) + i, n);
  Sums<kMix> sums;
  for (int e = 0; e < m.experts; ++e) {
    const VF d = load_n(static_cast<const T*>(m.expert[e]) + i, n) - base;
    VM kept = eq(d, d);
    if constexpr (kPick == Pick::random) {
      uint32_t word = 0;
      for (int k = 0; k < n; ++k) word |= static_cast<uint32_t>(draws.one(e, drawn + k)) << k;
      kept = lanes_of(word);
    }
    if constexpr (kPick == Pick::largest) kept = pick_largest(d, m.cut[e], (1u << n) - 1, ties + e);
    sums.template add<kPick == Pick::all>(kept, d, set1(m.weight[e]), set1(m.share[e]));
  }
  store_n(static_cast<T*>(m.out) + i, sums.result(base, set1(m.lambda)), n);
}

template <class T, Pick kPick, Mix kMix>
void merge_stretch(const DeltaMerge& m, int64_t begin, int64_t end, const Draws& draws,
                   int64_t* ties) {
  constexpr int64_t kTwo = 2 * kWidth;
  int64_t i = begin;
  // Up to where vectors are those of the block of draws.
  const int64_t whole = begin + (kPick == Pick::random ? -draws.from & (kTwo - 1) : 0);
  const auto few = [&](int64_t last) {
    for (; i < last; i += kWidth) {
      const int n = static_cast<int>(last - i < kWidth ? last - i : kWidth);
      merge_few<T, kPick, kMix>(m, i, n, i - begin, draws, ties);
    }
    i = last;
  };
  few(whole < end ? whole : end);
  int64_t vector = (draws.from + i - begin) / kWidth;
  const bool past = m.past_caches && is_aligned(static_cast<const T*>(m.out) + i);
  for (; i + kTwo <= end; i += kTwo, vector += 2)
    merge_two<T, kPick, kMix>(m, i, vector, draws, past, ties);
  few(end);
}

template <class T, Mix kMix>
void merge(const DeltaMerge& m, int64_t begin, int64_t end, int64_t* ties) {
  if (m.pick == Pick::random) {
    with_draws(m, begin, end, kSplit<T>, [&](int64_t from, int64_t to, const Draws& draws) {
      merge_stretch<T, Pick::random, kMix>(m, from, to, draws, ties);
    });
  } else if (m.pick == Pick::largest) {
    merge_stretch<T, Pick::largest, kMix>(m, begin, end, {}, ties);
  } else {
    merge_stretch<T, Pick::all, kMix>(m, begin, end, {}, ties);
  }
}

template <class T>
void merge_as(const DeltaMerge& m, int64_t begin, int64_t end, int64_t* ties) {
  if (!m.elect) return merge<T, Mix::plain>(m, begin, end, ties);
  if (m.normalize) return merge<T, Mix::elected_mean>(m, begin, end, ties);
  merge<T, Mix::elected_sum>(m, begin, end, ties);
}

template <class T>
void sum_as(const WeightedSum& m, int64_t begin, int64_t end) {
  int64_t i = begin;
  const bool past = m.past_caches && is_aligned(static_cast<const T*>(m.out) + i);
  for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
    VF sum[2] = {set1(-0.0f), set1(-0.0f)}, x[2];
    for (int e = 0; e < m.terms; ++e) {
      get_next_two<false>(static_cast<const T*>(m.term[e]) + i, x);
      for (int k = 0; k < 2; ++k) sum[k] = fused(set1(m.weight[e]), x[k], sum[k]);
    }
    put_two<false>(static_cast<T*>(m.out) + i, sum, past);
  }
  for (; i < end; i += kWidth) {
    const int n = static_cast<int>(end - i < kWidth ? end - i : kWidth);
    VF sum = set1(-0.0f);
    for (int e = 0; e < m.terms; ++e)
      sum = fused(set1(m.weight[e]), load_n(static_cast<const T*>(m.term[e]) + i, n), sum);
    store_n(static_cast<T*>(m.out) + i, sum, n);
  }
}

template <class T>
void keys_as(const T* base, const T* expert, int64_t n, uint32_t* keys) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    read_ahead<kWidth>(expert + i);
    read_ahead<kWidth>(base + i);
    store(keys + i, magnitude_key(load(expert + i) - load(base + i)));
  }
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store(keys + i, magnitude_key(load_n(expert + i, left) - load_n(base + i, left)));
  }
}

template <class T>
void sample_as(const T* base, const T* expert, const int64_t* at, int64_t n, uint32_t* keys) {
  constexpr int64_t kAhead = 16;  // places lie far apart
  for (int64_t j = 0; j < n; ++j) {
    if (j + kAhead < n) {
      __builtin_prefetch(base + at[j + kAhead]);
      __builtin_prefetch(expert + at[j + kAhead]);
    }
    store_n(keys + j, magnitude_key(load_n(expert + at[j], 1) - load_n(base + at[j], 1)), 1);
  }
}

constexpr int kSums = 8;  // partial sums of a norm

// sums[k] += x[i] (or its square) for i = k, k + kSums, ...; n is a multiple of kSums.
inline void add_up(const float* x, int64_t n, bool squared, double (&sums)[kSums]) {
  for (int64_t i = 0; i < n; i += kSums)
    for (int k = 0; k < kSums; ++k) {
      const auto y = static_cast<double>(x[i + k]);
      sums[k] += squared ? y * y : y;
    }
}

template <class T>
void norms_as(const DeltaMerge& m, int64_t begin, int64_t end, bool squared, double* all,
              double* kept) {
  // Whole tensors only: what is kept lies in whole vectors of the draws.
  with_draws(m, begin, end, false, [&](int64_t from, int64_t to, const Draws& draws) {
    alignas(64) float x[2][kDraws + kWidth];
    const int64_t n = to - from;
    for (int e = 0; e < m.experts; ++e) {
      const T* const base = static_cast<const T*>(m.base) + from;
      const T* const expert = static_cast<const T*>(m.expert[e]) + from;
      for (int64_t i = 0; i < n; i += kWidth) {
        const int left = static_cast<int>(n - i < kWidth ? n - i : kWidth);
        const VF d = left == kWidth ? load(expert + i) - load(base + i)
                                    : load_n(expert + i, left) - load_n(base + i, left);
        const VF magnitude = from_bits(bits(d) & seti(0x7FFFFFFFu));
        store(x[0] + i, magnitude);
        store(x[1] + i, select(draws.lanes(e, (draws.from + i) / kWidth), magnitude, set1(0.0f)));
      }
      const int64_t padded = (n + kSums - 1) / kSums * kSums;
      for (int k = 0; k < 2; ++k) {
        for (int64_t i = n; i < padded; ++i) x[k][i] = 0.0f;
        double sums[kSums] = {};
        add_up(x[k], padded, squared, sums);
        for (const double sum : sums) (k == 0 ? all : kept)[e] += sum;
      }
    }
  });
}

}  // namespace

void delta_merge(const DeltaMerge& m, int64_t begin, int64_t end, int64_t* ties) {
  with_type(m.dtype, [&]<class T>(T) { merge_as<T>(m, begin, end, ties); });
  if (m.past_caches) stream_fence();
}

void weighted_sum(const WeightedSum& m, int64_t begin, int64_t end) {
  with_type(m.dtype, [&]<class T>(T) { sum_as<T>(m, begin, end); });
  if (m.past_caches) stream_fence();
}

void magnitude_keys(const void* base, const void* expert, Dtype dtype, int64_t begin, int64_t n,
                    uint32_t* keys) {
  with_type(dtype, [&]<class T>(T) {
    keys_as(static_cast<const T*>(base) + begin, static_cast<const T*>(expert) + begin, n, keys);
  });
}

void magnitude_sample(const void* base, const void* expert, Dtype dtype, const int64_t* at,
                      int64_t n, uint32_t* keys) {
  with_type(dtype, [&]<class T>(T) {
    sample_as(static_cast<const T*>(base), static_cast<const T*>(expert), at, n, keys);
  });
}

void delta_norms(const DeltaMerge& m, int64_t begin, int64_t end, bool squared, double* all,
                 double* kept) {
  with_type(m.dtype, [&]<class T>(T) { norms_as<T>(m, begin, end, squared, all, kept); });
}

TENFOLD_ISA_END
