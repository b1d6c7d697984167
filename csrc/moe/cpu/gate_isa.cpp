// SPDX-License-Identifier: Apache-2.0
#include "moe/cpu/top_keys.h"

TENFOLD_ISA_BEGIN
namespace {

// The K largest of what has been inserted, in falling order, with their experts.
template <int K>
struct Largest {
  VF value[K];
  VI expert[K];

  // A logit that is not NaN, while the list has `Filled` entries. An equal one that came before
  // stays before it.
  template <int Filled>
  void insert(VF x, VI id) {
    VM before[K];
#pragma GCC unroll 8
    for (int j = 0; j < Filled; ++j) before[j] = gt(x, value[j]);
    if constexpr (Filled < K) {
      value[Filled] = x;
      expert[Filled] = id;
      if constexpr (Filled > 0) {
        value[Filled] = vmin(value[Filled - 1], x);
        expert[Filled] = select(before[Filled - 1], expert[Filled - 1], id);
      }
    }
#pragma GCC unroll 8
    for (int j = Filled - 1; j > 0; --j) {
      value[j] = vmax(value[j], vmin(value[j - 1], x));
      expert[j] = select(before[j], select(before[j - 1], expert[j - 1], id), expert[j]);
    }
    if constexpr (Filled > 0) {
      value[0] = vmax(value[0], x);
      expert[0] = select(before[0], id, expert[0]);
    }
  }
};

struct Choice {
  float* tile;  // of a group of lanes
  int64_t n;
  int tokens;  // lanes that have one
  bool fits;   // whether logits are known to leave their last bits to keys
  VF poison;   // NaN where a logit is

  VF next(int64_t e) {
    const VF x = load(tile + e * kGateTokens);
    poison = select(unordered(x), x, poison);
    return vmax(x, from_bits(seti(0xFF800000u)));  // -inf for NaN
  }
};

template <int K, int Filled>
inline void fill(Choice* c, Largest<K>* list) {
  if constexpr (Filled < K) {
    if (Filled >= c->n) return;
    list->template insert<Filled>(c->next(Filled), seti(Filled));
    fill<K, Filled + 1>(c, list);
  }
}

// Weights and experts to [k][kGateTokens].
template <int K>
inline void weigh(const Choice& c, const Largest<K>& list, int64_t k, bool renormalize,
                  float* weight, uint32_t* index) {
  VF y[K], sum = set1(0.0f);
#pragma GCC unroll 16
  for (int j = K - 1; j >= 0; --j) {  // from the smallest: sums that are small round less
    if (j >= k) continue;
    y[j] = exp(list.value[j] - list.value[0]);
    sum = sum + y[j];
  }
  if (!renormalize) sum = exp_sums(c.tile, 0, c.n, list.value[0], nullptr).sum;
#pragma GCC unroll 16
  for (int j = 0; j < K; ++j) {
    if (j >= k) break;
    store(weight + j * kGateTokens, select(unordered(c.poison), c.poison, y[j] / sum));
    store(index + j * kGateTokens, list.expert[j]);
  }
}

template <int K>
inline void choose(Choice c, int64_t k, bool renormalize, float* weight, uint32_t* index) {
  Largest<K> list;
  fill<K, 0>(&c, &list);
  for (int64_t e = K; e < c.n; ++e)
    list.template insert<K>(c.next(e), seti(static_cast<uint32_t>(e)));
  weigh(c, list, k, renormalize, weight, index);
}

// The same by keys. Where logits differ in bits that keys have not room for only, false.
template <int K>
inline bool choose_by_keys(Choice* c, int64_t k, bool renormalize, float* weight, uint32_t* index) {
  TopKeys<K> keys(c->tile, c->n);
  if (any(unordered(keys.finite))) [[unlikely]] {
    c->poison = replace_nan(c->tile, c->n);
    if (any(unordered(c->poison))) keys = TopKeys<K>(c->tile, c->n);
  }
  if (!c->fits && any(both(keys.tied(k), lanes_of((1u << c->tokens) - 1)))) {
    c->fits = fits_keys(c->tile, c->n, keys.low);
    if (!c->fits) return false;
  }
  Largest<K> list;
  const VI lane = iota();
#pragma GCC unroll 16
  for (int j = 0; j < K; ++j) {
    if (j >= k) break;
    list.expert[j] = keys.expert(j);
    list.value[j] = gather(c->tile, shl<4>(list.expert[j]) + lane);
  }
  weigh(*c, list, k, renormalize, weight, index);
  return true;
}

// The same for any k, with the list in memory: value in `weight`.
inline void choose_many(Choice c, int64_t k, bool renormalize, float* weight, uint32_t* index) {
  for (int64_t e = 0; e < c.n; ++e) {
    const VF x = c.next(e);
    const VI id = seti(static_cast<uint32_t>(e));
    int64_t j = k - 1;
    if (e < k) {  // a place at the end, which nothing is before
      j = e;
      store(weight + j * kGateTokens, from_bits(seti(0xFF800000u)));
      store(index + j * kGateTokens, id);
    }
    VF here = load(weight + j * kGateTokens);
    VI mine = load(index + j * kGateTokens);
    for (; j > 0; --j) {
      const VF before = load(weight + (j - 1) * kGateTokens);
      const VI other = load(index + (j - 1) * kGateTokens);
      const VM moves = gt(x, before), takes = gt(x, here);
      store(weight + j * kGateTokens, select(takes, select(moves, before, x), here));
      store(index + j * kGateTokens, select(takes, select(moves, other, id), mine));
      here = before, mine = other;
    }
    const VM takes = gt(x, here);
    store(weight, select(takes, x, here));
    store(index, select(takes, id, mine));
  }
  const VF top = load(weight);
  VF sum = set1(0.0f);
  for (int64_t j = k - 1; j >= 0; --j) {
    const VF y = exp(load(weight + j * kGateTokens) - top);
    store(weight + j * kGateTokens, y);
    sum = sum + y;
  }
  if (!renormalize) sum = exp_sums(c.tile, 0, c.n, top, nullptr).sum;
  for (int64_t j = 0; j < k; ++j) {
    float* const at = weight + j * kGateTokens;
    store(at, select(unordered(c.poison), c.poison, load(at) / sum));
  }
}

inline void choose_any(Choice c, int64_t k, bool renormalize, float* weight, uint32_t* index) {
  if (k == 1) return choose<1>(c, k, renormalize, weight, index);
  if (k == 2) return choose<2>(c, k, renormalize, weight, index);
  const bool keyed = c.n <= most_keyed(k);
  if (k <= 4) {
    if (keyed && choose_by_keys<4>(&c, k, renormalize, weight, index)) return;
    return choose<4>(c, k, renormalize, weight, index);
  }
  if (k <= 8) {
    if (keyed && choose_by_keys<8>(&c, k, renormalize, weight, index)) return;
    return choose<8>(c, k, renormalize, weight, index);
  }
  if (k <= 16 && keyed && choose_by_keys<16>(&c, k, renormalize, weight, index)) return;
  choose_many(c, k, renormalize, weight, index);
}

// Rows of k of [k][kGateTokens] words.
inline void write_rows(const float* from, int64_t rows, int64_t k, float* out) {
  int64_t t = 0;
  if (k == 2 && rows == kGateTokens) {
    for (; t < rows; t += kWidth)
      store_pairs(out + 2 * t, load(from + t), load(from + kGateTokens + t));
  } else if (k == 8) {
    for (; t + 8 <= rows; t += 8) transpose8(from + t, kGateTokens, out + 8 * t, 8);
  } else if (k == 4 || k == 6) {
    for (; t + 8 <= rows; t += 8) {
      float eight[64];
      transpose8_rows([=](int i) { return from + (i < k ? i : 0) * kGateTokens + t; }, eight, 8);
      for (int i = 0; i < 8; ++i) {
        float* const to = out + (t + i) * k;
        __builtin_memcpy(to, eight + 8 * i, 16);
        if (k == 6) __builtin_memcpy(to + 4, eight + 8 * i + 4, 8);
      }
    }
  }
  for (; t < rows; ++t)
    for (int64_t j = 0; j < k; ++j)
      __builtin_memcpy(out + t * k + j, from + j * kGateTokens + t, 4);
}

// The rows that are transposed next, while those before them are looked through.
template <class T>
inline void prefetch_rows(const T* x, int64_t stride, int64_t rows, int64_t n) {
  constexpr auto kLine = static_cast<int64_t>(64 / sizeof(T));
  for (int64_t t = 0; t < rows; ++t, x += stride)
    for (int64_t e = 0; e < n; e += kLine) __builtin_prefetch(x + e, 0, 2);
}

// Parts of the scratch memory of gate_scratch.
struct GateScratch {
  float *tile, *staged, *weight, *index, *softmax;

  GateScratch(float* at, int64_t n, int64_t k) {
    tile = at;
    staged = tile + round_up(n, 8) * kGateTokens;
    weight = staged + round_up(n, 8) * 8;
    index = weight + k * kGateTokens;
    softmax = index + k * kGateTokens;
  }
};

// row[e] = P_e by
template <class T>
inline void probabilities(const T* x, int64_t n, float largest, float factor, float by,
                          float* row) {
  for (int64_t e = 0; e < n; e += kWidth) {
    const int left = static_cast<int>(n - e < kWidth ? n - e : kWidth);
    store_n(row + e, exp(load_some(x + e, left) - set1(largest)) * set1(factor) * set1(by), left);
  }
}

// out = row + also, which may be null.
template <class T>
inline void finish_row(const float* row, const float* also, int64_t n, T* out) {
  for (int64_t e = 0; e < n; e += kWidth) {
    const int left = static_cast<int>(n - e < kWidth ? n - e : kWidth);
    const VF y = load_some(row + e, left);
    store_n(out + e, also != nullptr ? y + load_some(also + e, left) : y, left);
  }
}

// Tokens [begin, begin + rows) of a tile.
template <class T>
void gate_grad_tile(const GateGradParams& p, int64_t begin, int64_t rows, const T* x, T* out,
                    const GateScratch& s) {
  const int64_t n = p.experts, k = p.k;
  const TileSoftmax softmax{s.softmax, s.softmax + kGateTokens, nullptr};
  if (!p.renormalize) {
    load_tile(x, p.stride, rows, n, s.staged, s.tile);
    tile_softmax(s.tile, n, nullptr, softmax);
  }
  for (int64_t t = 0; t < rows; ++t, x += p.stride, out += n) {
    const float *const w = p.weight + (begin + t) * k, *const g = p.grad + (begin + t) * k;
    const int32_t* const at = p.index + (begin + t) * k;
    float* const row = s.staged;
    // Weights add up to 1 where they are renormalized: g may be seen from the first, and equal ones
    // give exactly 0. What cancels is computed in double; k is small.
    const double from = p.renormalize ? static_cast<double>(g[0]) : 0.0;
    double mean = 0.0;
    for (int64_t j = 0; j < k; ++j) mean += static_cast<double>(w[j]) * (g[j] - from);
    if (p.renormalize) {
      for (int64_t e = 0; e < n; ++e) row[e] = 0.0f;
    } else {
      probabilities(x, n, softmax.largest[t], softmax.factor[t], static_cast<float>(-mean), row);
    }
    for (int64_t j = 0; j < k; ++j)
      row[at[j]] = static_cast<float>(static_cast<double>(w[j]) * ((g[j] - from) - mean));
    finish_row(row, p.also != nullptr ? p.also + (begin + t) * n : nullptr, n, out);
  }
}

}  // namespace

void gate_rows(const GateParams& p, int64_t begin, int64_t end, float* scratch) {
  const GateScratch s(scratch, p.experts, p.k);
  auto* const index = reinterpret_cast<uint32_t*>(s.index);
  for (; begin < end; begin += kGateTokens) {
    const int64_t left = end - begin, rows = left < kGateTokens ? left : kGateTokens;
    with_rows(p.logits, p.dtype, p.stride, begin, [&](const auto* x) {
      load_tile(x, p.stride, rows, p.experts, s.staged, s.tile);
      const int64_t later = left - rows < kGateTokens ? left - rows : kGateTokens;
      prefetch_rows(x + rows * p.stride, p.stride, later, p.experts);
    });
    for (int64_t g = 0; g < rows; g += kWidth) {
      const int tokens = static_cast<int>(rows - g < kWidth ? rows - g : kWidth);
      choose_any({s.tile + g, p.experts, tokens, p.dtype != Dtype::f32, set1(0.0f)}, p.k,
                 p.renormalize, s.weight + g, index + g);
    }
    write_rows(s.weight, rows, p.k, p.weight + begin * p.k);
    write_rows(s.index, rows, p.k, reinterpret_cast<float*>(p.index) + begin * p.k);
  }
}

void gate_grad_rows(const GateGradParams& p, int64_t begin, int64_t end, float* scratch) {
  const GateScratch s(scratch, p.experts, p.k);
  for (; begin < end; begin += kGateTokens) {
    const int64_t rows = end - begin < kGateTokens ? end - begin : kGateTokens;
    if (p.dtype == Dtype::f32) {
      gate_grad_tile(p, begin, rows, static_cast<const float*>(p.logits) + begin * p.stride,
                     static_cast<float*>(p.out) + begin * p.experts, s);
    } else if (p.dtype == Dtype::bf16) {
      gate_grad_tile(p, begin, rows, static_cast<const bf16_t*>(p.logits) + begin * p.stride,
                     static_cast<bf16_t*>(p.out) + begin * p.experts, s);
    } else {
      gate_grad_tile(p, begin, rows, static_cast<const fp16_t*>(p.logits) + begin * p.stride,
                     static_cast<fp16_t*>(p.out) + begin * p.experts, s);
    }
  }
}

TENFOLD_ISA_END
