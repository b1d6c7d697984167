// SPDX-License-Identifier: Apache-2.0
// The SIMD kernel of masked_adamw_8bit_: one state block of 256 elements at a time, its moments as
// float32 in the first-level cache between dequantisation, update and quantisation.
#include "optim/cpu/adamw_vec.h"
#include "optim/cpu/mask_words.h"
#include "optim/masked_adamw_8bit.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kBlock = static_cast<int>(kStateBlock), kWords = kBlock / 64;

// The moments of a block, and the largest magnitude among the trained ones: as bits, so that NaN is
// larger than all numbers.
struct Moments {
  alignas(64) float m[kBlock];
  alignas(64) float v[kBlock];
};

inline VI magnitude(VF x) {
  return bits(x) & seti(0x7FFFFFFFu);
}

inline VI larger(VI a, VI b) {
  return select(lt(a, b), b, a);
}

inline float largest(VI a) {
  uint32_t lane[kWidth], most = 0;
  store(lane, a);
  for (uint32_t x : lane) most = x > most ? x : most;
  float f;
  memcpy(&f, &most, 4);
  return f;
}

inline void dequantise(const uint8_t* codes, const CodeBook& book, float absmax, float* out) {
  const VF scale = set1(absmax);
  for (int i = 0; i < kBlock; i += kWidth)
    store(out + i, lookup256(book.code, load_bytes(codes + i)) * scale);
}

// x / absmax for all of a block: exact without divisions where no remainder can be subnormal.
struct Quotient {
  VF absmax, inverse;
  bool divides;
  explicit Quotient(float a)
      : absmax(set1(a)), inverse(set1(1.0f / a)), divides(!(a > 0x1p-60f && a < 0x1p100f)) {}
  inline VF operator()(VF x) const {
    if (divides) return x / absmax;
    const VF q = x * inverse;
    return fused(fused_from(x, q, absmax), inverse, q);
  }
};

// Quantisation by one look-up per element (see CodeBook), in three passes over a block: gathers
// that nothing waits for overlap.
inline void quantise_by_table(const CodeBook& book, const float* x, float absmax, uint8_t* codes) {
  alignas(64) uint32_t ordered[kBlock], entry[kBlock];
  alignas(64) int32_t bucket[kBlock];
  const Quotient over(absmax);
  const VI edge = seti(CodeBook::kSmallest - 1), low = seti(0xFFFFu);
  for (int i = 0; i < kBlock; i += kWidth) {
    const VI b = bits(over(load(x + i))), sign = shr_signed<31>(b);
    const VI magnitude = b & seti(0x7FFFFFFFu), upper = shr<16>(magnitude);
    const VI at = select(lt(upper, edge), edge, upper) - edge;
    store(ordered + i, (b ^ (sign & seti(0x7FFFFFFFu))) & low);
    store(reinterpret_cast<uint32_t*>(bucket) + i, (at ^ sign) - sign);
  }
  const uint32_t* const middle = book.table + CodeBook::kBuckets;
  for (int i = 0; i < kBlock; i += kWidth) {
    const VI at = load(reinterpret_cast<const uint32_t*>(bucket) + i);
    store(entry + i, bits(gather(reinterpret_cast<const float*>(middle), at)));
  }
  for (int i = 0; i < kBlock; i += kWidth) {
    const VI e = load(entry + i), q = shr<16>(e);
    store_low_bytes(codes + i, select(lt(e & low, load(ordered + i)), q + seti(1), q));
  }
}

// Any sorted code book, and NaN (which is above no cut).
inline void quantise_by_search(const CodeBook& book, const float* x, float absmax, uint8_t* codes) {
  for (int i = 0; i < kBlock; ++i) {
    const float y = x[i] / absmax;
    int q = 0;
    for (int step = kCodes / 2; step > 0; step /= 2)
      if (q + step < kCodes && y > book.cut[q + step - 1]) q += step;
    codes[i] = book.first[q];
  }
}

inline void quantise(const CodeBook& book, const float* x, float absmax, uint8_t* codes) {
  if (absmax == 0.0f) {
    memset(codes, book.zero, kBlock);
  } else if (!book.has_table || !(absmax < 0x1p127f)) {
    quantise_by_search(book, x, absmax, codes);
  } else {
    quantise_by_table(book, x, absmax, codes);
  }
}

// For every byte of a mask its 8 bits as bytes of ones or zeros.
struct Spread {
  uint64_t bytes[256] = {};
  constexpr Spread() {
    for (uint64_t word = 0; word < 256; ++word)
      for (int bit = 0; bit < 8; ++bit)
        if ((word >> bit & 1) != 0) bytes[word] |= uint64_t{0xFF} << (8 * bit);
  }
};
constexpr Spread kSpread;

// The codes of trained elements over the old ones.
inline void keep_codes(uint8_t* to, const uint8_t* from, const uint64_t* words) {
  for (int i = 0; i < kBlock; i += 8) {
    const uint64_t on = kSpread.bytes[words[i / 64] >> (i % 64) & 255];
    uint64_t old, fresh;
    memcpy(&old, to + i, 8);
    memcpy(&fresh, from + i, 8);
    fresh = (fresh & on) | (old & ~on);
    memcpy(to + i, &fresh, 8);
  }
}

template <class P>
struct Task {
  AdamwConstants<VecOps> c;
  VF divisor, factor;
  bool divides, stochastic;
  Noise noise;
};

// Dequantised moments to updated ones, and p; the largest magnitudes of trained elements.
template <bool kAll, class P>
inline void update_moments(Task<P>& k, Moments* x, P* p, const P* g, const uint64_t* words,
                           int64_t i, float* absmax1, float* absmax2) {
  const AdamwConstants<VecOps> c = k.c;
  const VF divisor = k.divisor, factor = k.factor;
  const bool divides = k.divides, stochastic = k.stochastic;
  VI most1 = seti(0), most2 = seti(0);
  for (int j = 0; j < kBlock; j += kWidth) {
    const auto word =
        static_cast<uint32_t>(words[j / 64] >> (j % 64)) & static_cast<uint32_t>(low_bits(kWidth));
    if (!kAll && word == 0) continue;
    VF grad = load(g + j), m = load(x->m + j), v = load(x->v + j);
    grad = (divides ? grad / divisor : grad * divisor) * factor;
    adamw_moments<VecOps>(c, grad, &m, &v);
    VF param = adamw_param<VecOps>(c, load(p + j), m, v);
    if (stochastic) param = round_stochastic(param, k.noise.at(i + j));
    store(x->m + j, m), store(x->v + j, v);
    if constexpr (kAll) {
      most1 = larger(most1, magnitude(m)), most2 = larger(most2, magnitude(v));
      store_quick(p + j, param);
    } else {
      const VM on = lanes_of(word);
      most1 = larger(most1, select(on, magnitude(m), seti(0)));
      most2 = larger(most2, select(on, magnitude(v), seti(0)));
      store_where(p + j, on, param);
    }
  }
  *absmax1 = largest(most1), *absmax2 = largest(most2);
}

// p, g and codes of a whole block from element i on; kAll: all of it trains.
template <bool kAll, class P>
void update_block(Task<P>& k, const CodeBook& book1, const CodeBook& book2, P* p, const P* g,
                  uint8_t* codes1, uint8_t* codes2, float* absmax1, float* absmax2,
                  const uint64_t* words, int64_t i) {
  Moments x;
  dequantise(codes1, book1, *absmax1, x.m);
  dequantise(codes2, book2, *absmax2, x.v);
  update_moments<kAll>(k, &x, p, g, words, i, absmax1, absmax2);
  if constexpr (kAll) {
    quantise(book1, x.m, *absmax1, codes1);
    quantise(book2, x.v, *absmax2, codes2);
  } else {
    uint8_t fresh[kBlock];
    quantise(book1, x.m, *absmax1, fresh);
    keep_codes(codes1, fresh, words);
    quantise(book2, x.v, *absmax2, fresh);
    keep_codes(codes2, fresh, words);
  }
}

template <class P>
void run(const Adamw8Tensor& t, const AdamwScalars& s, const AdamwOptions& o, const CodeBook& book1,
         const CodeBook& book2, int64_t begin, int64_t end) {
  Task<P> k{adamw_constants<VecOps>(s),
            set1(s.divisor),
            set1(s.factor),
            s.divides != 0,
            o.stochastic && t.dtype == Dtype::bf16,
            Noise(o.seed, t.id, s.count)};
  auto *codes1 = static_cast<uint8_t*>(t.exp_avg), *codes2 = static_cast<uint8_t*>(t.exp_avg_sq);
  auto* const p = static_cast<P*>(t.param);
  const auto* const g = static_cast<const P*>(t.grad);
  MaskWords mask(t.mask, t.numel, begin);
  for (int64_t i = begin; i < end; i += kBlock) {
    uint64_t words[kWords], any = 0, all = ~uint64_t{0};
    for (int w = 0; w < kWords; ++w) {
      words[w] = i + w * 64 < t.numel ? mask.next() : 0;
      any |= words[w], all &= words[w];
    }
    if (any == 0) continue;
    float *const absmax1 = t.absmax1 + i / kBlock, *const absmax2 = t.absmax2 + i / kBlock;
    if (all == ~uint64_t{0}) {
      update_block<true>(k, book1, book2, p + i, g + i, codes1 + i, codes2 + i, absmax1, absmax2,
                         words, i);
    } else if (i + kBlock <= end) {
      update_block<false>(k, book1, book2, p + i, g + i, codes1 + i, codes2 + i, absmax1, absmax2,
                          words, i);
    } else {  // the short last block: on a copy
      const auto n = static_cast<size_t>(end - i);
      P last_p[kBlock] = {}, last_g[kBlock] = {};
      uint8_t last1[kBlock] = {}, last2[kBlock] = {};
      memcpy(last_p, p + i, n * sizeof(P));
      memcpy(last_g, g + i, n * sizeof(P));
      memcpy(last1, codes1 + i, n);
      memcpy(last2, codes2 + i, n);
      update_block<false>(k, book1, book2, last_p, last_g, last1, last2, absmax1, absmax2, words,
                          i);
      memcpy(p + i, last_p, n * sizeof(P));
      memcpy(codes1 + i, last1, n);
      memcpy(codes2 + i, last2, n);
    }
  }
}

}  // namespace

void masked_adamw_8bit_range(const Adamw8Tensor& t, const AdamwScalars& s, const AdamwOptions& o,
                             const CodeBook& book1, const CodeBook& book2, int64_t begin,
                             int64_t end) {
  if (t.dtype == Dtype::f32) run<float>(t, s, o, book1, book2, begin, end);
  if (t.dtype == Dtype::bf16) run<bf16_t>(t, s, o, book1, book2, begin, end);
  if (t.dtype == Dtype::f16) run<fp16_t>(t, s, o, book1, book2, begin, end);
}

TENFOLD_ISA_END
