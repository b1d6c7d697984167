#include "core/cpu/math.h"
#include "merge/delta_merge.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kDraws = 512;        // elements whose draws are made at once
constexpr int64_t kRow = kDraws + 64;  // bytes: a whole vector may be loaded at the last element

template <bool kWhole, class T>
inline VF get(const T* p, int n) {
  return kWhole ? load(p) : load_n(p, n);
}

// bytes[i]: the draw of element first + i; first is a multiple of kDraws.
void draw_bytes(const DropKey& key, uint64_t first, uint32_t expert, uint8_t* bytes) {
  const VI lanes = counter_lanes();
  uint32_t words[4 * kWidth];
  for (int64_t i = 0; i < kDraws; i += 16 * kWidth) {
    const uint64_t n = (first + static_cast<uint64_t>(i)) >> 4;  // a multiple of kWidth: no carry
    VI x[4] = {seti(static_cast<uint32_t>(n)) + lanes, seti(drop_word(n, expert, 0)),
               seti(key.stream_lo), seti(key.stream_hi)};
    philox_rounds(x, key.seed_lo, key.seed_hi);
    store_by_four(words, x[0], x[1], x[2], x[3]);
    __builtin_memcpy(bytes + i, words, sizeof(words));
  }
}

// Makes the bytes final: below the limit that is returned, an element is dropped.
uint32_t decide(const DropKey& key, uint64_t first, uint32_t expert, DropLimit limit,
                uint8_t* bytes) {
  if (limit.low == 0) return limit.high;
  const auto high = static_cast<uint8_t>(limit.high);
  for (int64_t i = 0; i < kDraws; i += 64) {
    uint8_t differs[64];
    for (int k = 0; k < 64; ++k) differs[k] = bytes[i + k] ^ high;
    for (int k = 0; k < 64; ++k) bytes[i + k] = bytes[i + k] > high ? 255 : 0;
    for (uint64_t equal = ~bits_of_bytes(differs); equal != 0; equal &= equal - 1) {
      const int64_t at = i + __builtin_ctzll(equal);
      if (!drop_by_second_draw(key, first + static_cast<uint64_t>(at), expert, limit))
        bytes[at] = 255;
    }
  }
  return 128;
}

inline VI magnitude_key(VF d) {
  const VI key = (bits(d) & seti(0x7FFFFFFFu)) + seti(1);
  return select(unordered(d), seti(0x80000000u), key);
}

// Lanes of the largest: above the cut, and the first of those equal to it. valid: bits of lanes.
inline VM pick_largest(VF d, uint32_t cut, uint32_t valid, int64_t* ties) {
  const VI key = magnitude_key(d);
  const VM over = above(key, seti(cut));
  if (*ties == 0) return over;
  uint32_t same = bits_of(eq(key, seti(cut))) & valid;
  if (same == 0) return over;
  uint32_t word = bits_of(over);
  for (; same != 0 && *ties > 0; same &= same - 1, --*ties) word |= same & -same;
  return lanes_of(word);
}

// What decides about the elements of one stretch.
struct Draws {
  const uint8_t* bytes;  // of the first element of the stretch, rows of kRow per expert
  const uint32_t* limit;
};

// Elements i .. i + n - 1, n = kWidth if kWhole.
template <class T, Pick kPick, bool kElect, bool kWhole>
inline void merge_vector(const DeltaMerge& m, int64_t i, int n, int64_t drawn, const Draws& draws,
                         int64_t* ties) {
  const VF zero = set1(0.0f);
  const VF base = get<kWhole>(static_cast<const T*>(m.base) + i, n);
  VF sum = set1(-0.0f), negative = set1(-0.0f), shares = zero, negative_shares = zero;
  for (int e = 0; e < m.experts; ++e) {
    const VF d = get<kWhole>(static_cast<const T*>(m.expert[e]) + i, n) - base;
    const VF c = set1(m.weight[e]);
    VM kept = eq(zero, zero);
    if constexpr (kPick == Pick::random) {
      const VI byte = load_bytes(draws.bytes + e * kRow + drawn);
      kept = above(byte + seti(1), seti(draws.limit[e]));
    }
    if constexpr (kPick == Pick::largest)
      kept = pick_largest(d, m.cut[e], kWhole ? ~0u : (1u << n) - 1, ties + e);
    if constexpr (kElect) {
      const VF v = kPick == Pick::all ? c * d : select(kept, c * d, zero);
      const VF share = set1(m.share[e]);
      sum = sum + vmax(zero, v);  // NaN is the second operand, so it reaches both sums
      negative = negative + vmin(zero, v);
      shares = shares + select(gt(v, zero), share, zero);
      negative_shares = negative_shares + select(lt(v, zero), share, zero);
    } else {
      const VF added = fused(c, d, sum);
      sum = kPick == Pick::all ? added : select(kept, added, sum);
    }
  }
  VF out = base + sum;
  if constexpr (kElect) {
    const VM positive = ge(sum + negative, zero);
    VF mass = select(positive, sum, negative);
    if (m.normalize) {
      const VF share = select(positive, shares, negative_shares);
      mass = mass / select(eq(share, zero), set1(1.0f), share);
    }
    out = fused(mass, set1(m.lambda), base);
  }
  T* const to = static_cast<T*>(m.out) + i;
  if constexpr (kWhole) {
    store(to, out);
  } else {
    store_n(to, out, n);
  }
}

template <class T, Pick kPick, bool kElect>
void merge_stretch(const DeltaMerge& m, int64_t begin, int64_t end, const Draws& draws,
                   int64_t* ties) {
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth)
    merge_vector<T, kPick, kElect, true>(m, i, kWidth, i - begin, draws, ties);
  if (i < end)
    merge_vector<T, kPick, kElect, false>(m, i, static_cast<int>(end - i), i - begin, draws, ties);
}

// Calls f(begin, end, draws) for stretches of [begin, end) that share one block of draws.
template <class F>
void with_draws(const DeltaMerge& m, int64_t begin, int64_t end, const F& f) {
  alignas(64) uint8_t bytes[kMaxExperts * kRow];
  uint32_t limit[kMaxExperts];
  for (int64_t i = begin; i < end;) {
    const int64_t at = m.offset + i, first = at & ~(kDraws - 1);
    const int64_t left = first + kDraws - at, n = end - i < left ? end - i : left;
    for (int e = 0; e < m.experts; ++e) {
      uint8_t* const row = bytes + e * kRow;
      draw_bytes(m.key, static_cast<uint64_t>(first), m.number[e], row);
      limit[e] = decide(m.key, static_cast<uint64_t>(first), m.number[e], m.drop[e], row);
    }
    f(i, i + n, Draws{bytes + (at - first), limit});
    i += n;
  }
}

template <class T, bool kElect>
void merge(const DeltaMerge& m, int64_t begin, int64_t end, int64_t* ties) {
  if (m.pick == Pick::random) {
    with_draws(m, begin, end, [&](int64_t from, int64_t to, const Draws& draws) {
      merge_stretch<T, Pick::random, kElect>(m, from, to, draws, ties);
    });
  } else if (m.pick == Pick::largest) {
    merge_stretch<T, Pick::largest, kElect>(m, begin, end, {}, ties);
  } else {
    merge_stretch<T, Pick::all, kElect>(m, begin, end, {}, ties);
  }
}

template <class T>
void merge_as(const DeltaMerge& m, int64_t begin, int64_t end, int64_t* ties) {
  if (m.elect) return merge<T, true>(m, begin, end, ties);
  merge<T, false>(m, begin, end, ties);
}

template <class T, bool kWhole>
inline void sum_vector(const WeightedSum& m, int64_t i, int n) {
  VF sum = set1(-0.0f);
  for (int e = 0; e < m.terms; ++e)
    sum = fused(set1(m.weight[e]), get<kWhole>(static_cast<const T*>(m.term[e]) + i, n), sum);
  T* const to = static_cast<T*>(m.out) + i;
  if constexpr (kWhole) {
    store(to, sum);
  } else {
    store_n(to, sum, n);
  }
}

template <class T>
void sum_as(const WeightedSum& m, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) sum_vector<T, true>(m, i, kWidth);
  if (i < end) sum_vector<T, false>(m, i, static_cast<int>(end - i));
}

template <class T>
void keys_as(const T* base, const T* expert, int64_t n, uint32_t* keys) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store(keys + i, magnitude_key(load(expert + i) - load(base + i)));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store(keys + i, magnitude_key(load_n(expert + i, left) - load_n(base + i, left)));
  }
}

template <class T>
void sample_as(const T* base, const T* expert, const int64_t* at, int64_t n, uint32_t* keys) {
  for (int64_t j = 0; j < n; ++j)
    store_n(keys + j, magnitude_key(load_n(expert + at[j], 1) - load_n(base + at[j], 1)), 1);
}

constexpr int kSums = 8;  // partial sums of a norm

template <class T>
void norms_as(const DeltaMerge& m, int64_t begin, int64_t end, bool squared, double* all,
              double* kept) {
  with_draws(m, begin, end, [&](int64_t from, int64_t to, const Draws& draws) {
    alignas(64) float d[kDraws + kWidth];
    const int64_t n = to - from;
    for (int e = 0; e < m.experts; ++e) {
      const T* const base = static_cast<const T*>(m.base) + from;
      const T* const expert = static_cast<const T*>(m.expert[e]) + from;
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) store(d + i, load(expert + i) - load(base + i));
      if (i < n) {
        const int left = static_cast<int>(n - i);
        store_n(d + i, load_n(expert + i, left) - load_n(base + i, left), left);
      }
      double sums[2][kSums] = {};
      for (int64_t j = 0; j < n; ++j) {
        const double magnitude = __builtin_fabs(static_cast<double>(d[j]));
        const double x = squared ? magnitude * magnitude : magnitude;
        sums[0][j % kSums] += x;
        sums[1][j % kSums] += draws.bytes[e * kRow + j] < draws.limit[e] ? 0.0 : x;
      }
      for (int k = 0; k < kSums; ++k) {
        all[e] += sums[0][k];
        kept[e] += sums[1][k];
      }
    }
  });
}

}  // namespace

void delta_merge(const DeltaMerge& m, int64_t begin, int64_t end, int64_t* ties) {
  if (m.dtype == Dtype::f32) return merge_as<float>(m, begin, end, ties);
  if (m.dtype == Dtype::bf16) return merge_as<bf16_t>(m, begin, end, ties);
  merge_as<fp16_t>(m, begin, end, ties);
}

void weighted_sum(const WeightedSum& m, int64_t begin, int64_t end) {
  if (m.dtype == Dtype::f32) return sum_as<float>(m, begin, end);
  if (m.dtype == Dtype::bf16) return sum_as<bf16_t>(m, begin, end);
  sum_as<fp16_t>(m, begin, end);
}

void magnitude_keys(const void* base, const void* expert, Dtype dtype, int64_t begin, int64_t n,
                    uint32_t* keys) {
  const auto run = [&]<class T>(T) {
    keys_as(static_cast<const T*>(base) + begin, static_cast<const T*>(expert) + begin, n, keys);
  };
  if (dtype == Dtype::f32) return run(float{});
  if (dtype == Dtype::bf16) return run(bf16_t{});
  run(fp16_t{});
}

void magnitude_sample(const void* base, const void* expert, Dtype dtype, const int64_t* at,
                      int64_t n, uint32_t* keys) {
  const auto run = [&]<class T>(T) {
    sample_as(static_cast<const T*>(base), static_cast<const T*>(expert), at, n, keys);
  };
  if (dtype == Dtype::f32) return run(float{});
  if (dtype == Dtype::bf16) return run(bf16_t{});
  run(fp16_t{});
}

void delta_norms(const DeltaMerge& m, int64_t begin, int64_t end, bool squared, double* all,
                 double* kept) {
  if (m.dtype == Dtype::f32) return norms_as<float>(m, begin, end, squared, all, kept);
  if (m.dtype == Dtype::bf16) return norms_as<bf16_t>(m, begin, end, squared, all, kept);
  norms_as<fp16_t>(m, begin, end, squared, all, kept);
}

TENFOLD_ISA_END
