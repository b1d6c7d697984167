// SPDX-License-Identifier: Apache-2.0
// CPU kernel of dha_attention: flash attention on tiles of query rows.
//
// Lanes hold query rows, so logits, weights and sums are stored transposed (core/cpu/panels.h). A
// task takes a few tiles over all blocks of kBlockKeys keys that they see:
//   1. pack the block: keys as panels of 8 keys, values as panels of 8 dims; all tiles share them;
//   2. per tile: S^T = K q^T with the products in registers; soft cap, bias and mask where needed.
//      A relative bias is a Toeplitz matrix: sums begin with vectors that overlap in memory;
//   3. P^T = exp2(S^T - m) with the running maximum m, lane by lane, sums on the way;
//   4. out^T = out^T * factor + V^T P^T, summed per block.
// At the end out^T / sum is turned back into rows. bf16 with dot products: P is rounded to bf16 in
// pairs of keys (torch's own kernel does the same); everything else is float32.
// A value that a row does not see never reaches it: where a block with masked keys holds an inf or
// a NaN, step 4 goes key by key under the mask.
#include "attention/cpu/attention_rows.h"
#include "attention/cpu/attention_tiles.h"
#include "core/cpu/packed.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kMostTiles = 8;
// Words of the first product that are summed one after another. Short chains round less but are
// stored more often; a tile of few rows is not worth the last percent of speed.
template <int V>
constexpr int64_t kChain = V == kVecs ? 64 : 16;

struct Plan {
  int64_t depth, keys, value_pad;  // words of the first product, keys of a block, DV in eights
  int64_t tile_size;
  // A weight is exp2((logit - maximum) * unit). Logits are plain products, scaled only in `unit`,
  // where their differences have been taken: that rounds least. Scaled at once where they must be:
  // for soft cap and bias, and for a scale that turns their order.
  bool scaled;
  bool from_bias;  // sums begin with the relative bias: they are not scaled afterwards
  float unit, lse_scale;
};

template <bool Dot>
inline Plan make_plan(const AttentionForward& p) {
  Plan plan{};
  plan.depth = packed_words<Dot>(p.head_dim);
  // Half of the keys where words are floats: sums over a block are one chain of roundings.
  const bool half = !Dot || p.head_dim > 128 || p.value_dim > 128;
  plan.keys = half ? kBlockKeys / 2 : kBlockKeys;
  plan.value_pad = round_up(p.value_dim, kPackRows<Dot>);
  plan.scaled = p.softcap > 0.0f || p.bias.kind != BiasKind::none || p.relative.data != nullptr ||
                !(p.scale > 1e-30f);
  plan.from_bias = p.relative.data != nullptr && p.scale == 1.0f;
  plan.unit = plan.scaled ? kLog2e : p.scale * kLog2e;
  plan.lse_scale = plan.scaled ? 1.0f : p.scale;
  plan.tile_size = (plan.depth + plan.value_pad) * kTileRows;
  return plan;
}

inline int64_t longest_row(const AttentionForward& p) {
  return round_up(p.head_dim > p.value_dim ? p.head_dim : p.value_dim, 16);
}

// A tile with its memory and running state.
struct Tile {
  Rows rows;
  float *q, *out;  // [depth][kTileRows], [value_pad][kTileRows]
  bool started;    // out holds sums
  alignas(64) float top[kTileRows], sum[kTileRows], factor[kTileRows];
};

// Keys of a block are counted in eights, where tiles multiply in the depth of a tile.
template <bool Dot>
constexpr int64_t kKeyStep = kByTiles<Dot> ? 32 : 8;

// Packed keys [first, first + count) of the task's sequence; `count` in kKeyStep, zeros past the
// end.
struct Block {
  int64_t first, count, value_depth;
  float *keys, *values;
  bool finite;  // all values are
};

struct Memory {
  float *logits, *staged, *keys, *values, *tiles;
};

// Floats for the logits of a tile, later for its rows of out.
inline int64_t logits_size(const Plan& plan) {
  return (plan.value_pad > kBlockKeys ? plan.value_pad : kBlockKeys) * kTileRows;
}

template <bool Dot>
inline Memory split_memory(const AttentionForward& p, const Plan& plan, void* scratch) {
  Memory m{};
  m.logits = static_cast<float*>(scratch);
  m.staged = m.logits + logits_size(plan);
  m.keys = m.staged + 8 * longest_row(p);
  m.values = m.keys + plan.keys * plan.depth;
  m.tiles = m.values + words<Dot>(plan.keys) * plan.value_pad;
  return m;
}

template <class T, bool Dot>
void start_tile(const AttentionForward& p, const AttentionTask& t, int64_t tile, float* staged,
                Tile* x) {
  x->rows = tile_rows(p, t, tile);
  x->started = false;
  const AttentionSequence s = attention_sequence(p, t.sequence);
  const T* row[kTileRows] = {};
  for (int i = 0; i < kTileRows; ++i) {
    x->top[i] = kLowest, x->sum[i] = 0.0f;
    if (i < x->rows.count)
      row[i] = row_at<const T>(p.q, p.q_at, t.sequence, s.q_first, x->rows.head[i], x->rows.row[i]);
  }
  pack_tile<T, Dot>(row, p.head_dim, staged, x->q);
}

inline bool all_finite(const float* x, int64_t words, [[maybe_unused]] bool pairs) {
  VF sum = set1(0.0f);
  const VF zero = set1(0.0f);
  for (int64_t i = 0; i < words; i += kWidth) {
#if defined(TENFOLD_ISA_BF16)
    if (pairs) {
      sum = dot_bf16(sum, bits(load(x + i)), bits(zero));
      continue;
    }
#endif
    sum = fma(load(x + i), zero, sum);  // 0 * inf is NaN
  }
  return !any(unordered(sum));
}

template <class T, bool Dot>
void pack_block(const AttentionForward& p, const Plan& plan, const AttentionTask& t, int64_t first,
                int64_t last, const Memory& m, Block* b) {
  const AttentionSequence s = attention_sequence(p, t.sequence);
  const AttentionGroup& g = t.group;
  const int64_t n = last - first;
  b->first = first, b->count = round_up(n, kKeyStep<Dot>);
  b->value_depth = words<Dot>(b->count);
  b->keys = m.keys, b->values = m.values;
  const T* keys = row_at<const T>(p.k, p.k_at, t.sequence, s.k_first, g.key_head, first);
  const T* values = row_at<const T>(p.v, p.v_at, t.sequence, s.k_first, g.value_head, first);
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) {
    for (int64_t j = 0; j < b->count; j += kAmxRows) {
      const bf16_t* row[kAmxRows] = {};
      for (int64_t i = 0; i < kAmxRows && j + i < n; ++i) row[i] = keys + (j + i) * p.k_at.row;
      pack_panel16(row, p.head_dim, m.keys + j * plan.depth);
    }
    pack_columns16([&](int64_t j) { return values + j * p.v_at.row; }, n, p.value_dim,
                   b->value_depth * kAmxRows, m.values);
    b->finite = all_finite(m.values, plan.value_pad * b->value_depth, Dot);
    return;
  }
#endif
  pack_panels<T, Dot>(keys, p.k_at.row, n, p.head_dim, m.staged, m.keys);
  pack_columns<T, Dot>(values, p.v_at.row, n, p.value_dim, b->value_depth, m.staged, m.values);
  b->finite = all_finite(m.values, plan.value_pad * b->value_depth, Dot);
}

// The keys of a block that a tile sees, in eights: vector v of its rows sees none of [end[v], ...),
// and end[] does not fall. So the products of a causal tile's last keys leave its first rows out.
// (AMX tiles multiply all rows.)
struct Span {
  int64_t begin, end[kVecs];
};

template <bool Dot>
inline Span seen_span(const Rows& r, const Block& b) {
  Span s{};
  constexpr int64_t kStep = kKeyStep<Dot>;
  const int64_t lo = r.any.first > b.first ? r.any.first - b.first : 0;
  s.begin = lo / kStep * kStep;
  for (int v = 0; v < r.vecs; ++v) {
    const int64_t seen = kByTiles<Dot> ? r.any.last : r.vec_last[v];
    const int64_t left = round_up(seen - b.first, kStep);
    s.end[v] = left < s.begin ? s.begin : left < b.count ? left : b.count;
    if (v > 0 && s.end[v] < s.end[v - 1]) s.end[v] = s.end[v - 1];
  }
  return s;
}

// Logits of keys [j, end) of the block for the vectors of [First, V) -> s [key][kTileRows]. Long
// rows are summed in chains of kChain words.
template <int V, bool Dot, int First>
void logits_from(const AttentionForward& p, const Plan& plan, const Tile& x, const Block& b,
                 int64_t j, int64_t end, float* s) {
  for (; j < end; j += kCols) {
    const float* const panel = b.keys + j / kPanel * kPanel * plan.depth + j % kPanel;
    float* const to = s + j * kTileRows;
    for (int64_t d = 0; d < plan.depth; d += kChain<V>) {
      VF acc[kCols][V];
      if (d == 0 && plan.from_bias) {
        const float* const bias = relative_bias(p.relative, x.rows, b.first + j);
        for (int c = 0; c < kCols; ++c)
          for (int v = First; v < V; ++v) acc[c][v] = load(bias - c + v * kWidth);
      } else {
        for (auto& key : acc)
          for (int v = First; v < V; ++v) key[v] = set1(0.0f);
      }
      const int64_t n = plan.depth - d < kChain<V> ? plan.depth - d : kChain<V>;
      multiply<V, Dot, First>(x.q + d * kTileRows, panel + d * kPanel, n, acc);
      for (int c = 0; c < kCols; ++c)
        for (int v = First; v < V; ++v) {
          float* const logit = to + c * kTileRows + v * kWidth;
          store(logit, d > 0 ? load(logit) + acc[c][v] : acc[c][v]);
        }
    }
  }
}

// What must not wait for the softmax's unit, and then the relative bias.
template <int V>
inline void scale_logits(const AttentionForward& p, const Plan& plan, const Tile& x, const Block& b,
                         const Span& at, float* s) {
  if (!plan.scaled || p.scale == 1.0f) return;
  const VF scale = set1(p.scale);
  const bool biased = p.relative.data != nullptr;
  for (int64_t j = at.begin; j < at.end[V - 1]; ++j) {
    float* const to = s + j * kTileRows;
    const float* const bias = biased ? relative_bias(p.relative, x.rows, b.first + j) : nullptr;
    for (int v = 0; v < V; ++v) {
      if (j >= at.end[v]) continue;
      const VF logit = load(to + v * kWidth);
      store(to + v * kWidth, biased ? fma(logit, scale, load(bias + v * kWidth)) : logit * scale);
    }
  }
}

template <int V, bool Dot>
void logits(const AttentionForward& p, const Plan& plan, const Tile& x, const Block& b,
            const Span& at, float* s) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) {
    amx_fence();
    for (int64_t j = at.begin; j < at.end[0]; j += 2 * kAmxRows)
      multiply_keys<2, V>(x.q, b.keys + j * plan.depth, plan.depth,
                          plan.from_bias ? relative_bias(p.relative, x.rows, b.first + j) : nullptr,
                          s + j * kTileRows);
    amx_fence();
    return scale_logits<V>(p, plan, x, b, at, s);
  }
#endif
  logits_from<V, Dot, 0>(p, plan, x, b, at.begin, at.end[0], s);
  if constexpr (V > 1) logits_from<V, Dot, 1>(p, plan, x, b, at.end[0], at.end[1], s);
  if constexpr (V > 2) logits_from<V, Dot, 2>(p, plan, x, b, at.end[1], at.end[2], s);
  scale_logits<V>(p, plan, x, b, at, s);
}

// Weights in place of the logits (pairs: in place of the first half of them) and the factor of what
// was summed before. Marked: weights of hidden keys are -0. Drops: some do not reach the values.
template <int V, bool Pairs, bool Marked, bool Drops>
void softmax(const AttentionForward& p, const Plan& plan, int64_t sequence, int64_t first, Tile& x,
             const Span& span, float* s) {
  const int64_t j0 = span.begin;
  const VF unit = set1(plan.unit), floor = set1(exp2_floor(plan.unit));
  for (int v = 0; v < V; ++v) {
    const int at = v * kWidth;
    const int64_t j1 = span.end[v];
    float* const column = s + at;
    VF top = load(x.top + at), sum = set1(0.0f);
    const VF before = top;
    for (int64_t j = j0; j < j1; ++j) top = vmax(load(column + j * kTileRows), top);
    [[maybe_unused]] Draws draws(p, x.rows, sequence, v);
    const auto weight = [&](int64_t j) {
      const VF logit = load(column + j * kTileRows);
      VF e = exp2_scaled(logit - top, unit, floor);
      sum = sum + e;
      if constexpr (Drops) {
        if (j % 4 == 0) draws.draw(p.dropout, first + j);
        e = draws(p.dropout, j, e);
      }
      return Marked ? select(eq(logit, minus_infinity()), set1(-0.0f), e) : e;
    };
    if constexpr (Pairs) {
#if defined(TENFOLD_ISA_BF16)
      for (int64_t j = j0; j < j1; j += 2) {
        const VF first = weight(j), second = weight(j + 1);
        store(column + j / 2 * kTileRows, to_pairs(first, second));
      }
#endif
    } else {
      for (int64_t j = j0; j < j1; ++j) store(column + j * kTileRows, weight(j));
    }
    const VF factor = exp2_scaled(before - top, unit, floor);
    store(x.factor + at, factor);
    store(x.sum + at, fma(load(x.sum + at), factor, sum));
    store(x.top + at, top);
  }
}

template <int V, bool Pairs, bool Marked>
void make_weights(const AttentionForward& p, const Plan& plan, const AttentionTask& t, Tile& x,
                  const Block& b, const Span& span, float* s) {
  if (p.dropout.below != 0) {
    softmax<V, Pairs, Marked, true>(p, plan, t.sequence, b.first, x, span, s);
  } else {
    softmax<V, Pairs, Marked, false>(p, plan, t.sequence, b.first, x, span, s);
  }
}

#if defined(TENFOLD_ISA_AMX)
template <int V>
void values_by_tiles(const Plan& plan, Tile& x, const Block& b, const Span& at, const float* p) {
  if (x.started) {
    for (int v = 0; v < V; ++v) {
      const VF factor = load(x.factor + v * kWidth);
      if (!any(lt(factor, set1(1.0f))) && !any(unordered(factor))) continue;
      for (int64_t d = 0; d < plan.value_pad; ++d) {
        float* const out = x.out + d * kTileRows + v * kWidth;
        store(out, load(out) * factor);
      }
    }
  }
  const auto nothing = [] {};
  const int64_t first = at.begin / 2, depth = (at.end[0] - at.begin) / 2;
  const LeftTiles left = left_panels(b.values + first * kAmxRows, b.value_depth * kAmxRows);
  multiply_block(left, plan.value_pad, p + first * kTileRows, 0, V * kWidth, depth, depth, x.out,
                 kTileRows, x.started, nothing);
  amx_fence();
}
#endif

// out^T = out^T * factor + V^T P^T
template <int V, bool Dot>
void values(const Plan& plan, Tile& x, const Block& b, const Span& at, const float* p) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) return values_by_tiles<V>(plan, x, b, at, p);
#endif
  constexpr int64_t kStep = Dot ? 2 : 1;
  const int64_t j0 = at.begin / kStep, j1 = at.end[0] / kStep;
  for (int64_t c = 0; c < plan.value_pad; c += kCols) {
    VF acc[kCols][V];
    float* const out = x.out + c * kTileRows;
    for (int i = 0; i < kCols; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = set1(0.0f);
    const float* const panel = b.values + c / kPanel * kPanel * b.value_depth + c % kPanel;
    multiply<V, Dot>(p + j0 * kTileRows, panel + j0 * kPanel, j1 - j0, acc);
    if constexpr (V > 1) {
      const int64_t j2 = at.end[1] / kStep;
      multiply<V, Dot, 1>(p + j1 * kTileRows, panel + j1 * kPanel, j2 - j1, acc);
      if constexpr (V > 2)
        multiply<V, Dot, 2>(p + j2 * kTileRows, panel + j2 * kPanel, at.end[2] / kStep - j2, acc);
    }
    for (int i = 0; i < kCols; ++i)
      for (int v = 0; v < V; ++v) {
        float* const sum = out + i * kTileRows + v * kWidth;
        store(sum, x.started ? fma(load(sum), load(x.factor + v * kWidth), acc[i][v]) : acc[i][v]);
      }
  }
}

// The same key by key, without the hidden ones (weights marked -0), for blocks with an inf or NaN.
template <class T>
void values_seen(const AttentionForward& p, const Plan& plan, const AttentionTask& t, Tile& x,
                 const Block& b, const Span& at, const float* weights, float* staged) {
  const AttentionSequence s = attention_sequence(p, t.sequence);
  for (int64_t i = 0; i < plan.value_pad * kTileRows; i += kWidth)
    store(x.out + i, x.started ? load(x.out + i) * load(x.factor + i % kTileRows) : set1(0.0f));
  const int64_t left = s.num_keys - b.first, most = at.end[x.rows.vecs - 1];
  for (int64_t j = at.begin; j < (left < most ? left : most); ++j) {
    row_to_float(
        row_at<const T>(p.v, p.v_at, t.sequence, s.k_first, t.group.value_head, b.first + j),
        p.value_dim, staged);
    for (int v = 0; v < x.rows.vecs; ++v) {
      if (j >= at.end[v]) continue;
      const VF weight = load(weights + j * kTileRows + v * kWidth);
      const VM hidden = eq(bits(weight), seti(0x80000000u));
      for (int64_t d = 0; d < p.value_dim; ++d) {
        float* const out = x.out + d * kTileRows + v * kWidth;
        store(out, select(hidden, load(out), fma(set1(staged[d]), weight, load(out))));
      }
    }
  }
}

template <class T, bool Dot, int V>
void tile_block(const AttentionForward& p, const Plan& plan, const AttentionTask& t,
                const Memory& m, const Block& b, Tile& x) {
  const Rows& r = x.rows;
  const Span at = seen_span<Dot>(r, b);
  const int64_t j0 = at.begin, j1 = at.end[V - 1];
  if (j0 >= j1) return;
  float* const s = m.logits;
  const bool biased = p.bias.kind != BiasKind::none;
  const bool edge = b.first + j0 < r.all.first || b.first + j1 > r.all.last;
  logits<V, Dot>(p, plan, x, b, at, s);
  if (p.softcap > 0.0f) cap_logits(p.softcap, (j1 - j0) * kTileRows, s + j0 * kTileRows);
  if (biased) {
    const int64_t left = attention_sequence(p, t.sequence).num_keys - b.first;
    add_bias_block(p.bias, r, t.sequence, b.first + j0, (left < j1 ? left : j1) - j0, m.staged,
                   s + j0 * kTileRows);
  }
  if (edge) hide_keys(r, b.first + j0, j1 - j0, s + j0 * kTileRows);
  if (!b.finite && (edge || biased)) {
    make_weights<V, false, true>(p, plan, t, x, b, at, s);
    values_seen<T>(p, plan, t, x, b, at, s, m.staged);
  } else {
    make_weights<V, Dot, false>(p, plan, t, x, b, at, s);
    values<V, Dot>(plan, x, b, at, s);
  }
  x.started = true;
}

template <class T>
void finish_tile(const AttentionForward& p, const Plan& plan, const AttentionTask& t, Tile& x,
                 float* turned) {
  const AttentionSequence s = attention_sequence(p, t.sequence);
  alignas(64) float lse[kTileRows];
  const VF zero = set1(0.0f), infinity = zero - minus_infinity();
  for (int v = 0; v < x.rows.vecs; ++v) {
    const int at = v * kWidth;
    const VF sum = load(x.sum + at), top = load(x.top + at);
    const VM nothing = eq(sum, zero);
    store(x.factor + at, select(nothing, zero, set1(1.0f) / sum));
    const VF log = fma(top, set1(plan.lse_scale), det_log(sum));
    const VF whole = select(eq(top, infinity), infinity, log);
    store(lse + at, select(nothing, minus_infinity(), whole));
    for (int64_t d = 0; d < plan.value_pad; ++d) {
      float* const out = x.out + d * kTileRows + at;
      store(out, select(nothing, zero, x.started ? load(out) * load(x.factor + at) : zero));
    }
  }
  for (int64_t d = 0; d < plan.value_pad; d += 8)
    for (int i = 0; i < kTileRows; i += 8) {
      float spare[8][8];
      if (kTileRows - i >= 8) {
        transpose8(x.out + d * kTileRows + i, kTileRows, turned + i * plan.value_pad + d,
                   plan.value_pad);
      } else {
        float from[8][8] = {};
        for (int k = 0; k < 8; ++k)
          __builtin_memcpy(from[k], x.out + (d + k) * kTileRows + i, (kTileRows - i) * 4);
        transpose8(from[0], 8, spare[0], 8);
        for (int k = 0; k < kTileRows - i; ++k)
          __builtin_memcpy(turned + (i + k) * plan.value_pad + d, spare[k], sizeof spare[k]);
      }
    }
  for (int i = 0; i < x.rows.count; ++i) {
    const int64_t head = x.rows.head[i], row = x.rows.row[i];
    T* const out = row_at<T>(p.out, p.out_at, t.sequence, s.q_first, head, row);
    const float* const from = turned + i * plan.value_pad;
    int64_t d = 0;
    for (; d + kWidth <= p.value_dim; d += kWidth) store(out + d, load(from + d));
    if (d < p.value_dim) {
      const int n = static_cast<int>(p.value_dim - d);
      store_n(out + d, load_n(from + d, n), n);
    }
    p.lse[t.sequence * p.lse_batch + head * p.lse_head + s.q_first + row] = lse[i];
  }
}

template <class T, bool Dot>
void run_task(const AttentionForward& p, const AttentionTask& t, void* scratch) {
  const Plan plan = make_plan<Dot>(p);
  const Memory m = split_memory<Dot>(p, plan, scratch);
#if defined(TENFOLD_ISA_AMX)
  const AmxTiles registers;
#endif
  Tile tiles[kMostTiles];
  const auto count = static_cast<int>(t.tile_end - t.tile_begin);
  int64_t lo = attention_sequence(p, t.sequence).num_keys, hi = 0;
  for (int i = 0; i < count; ++i) {
    Tile& x = tiles[i];
    x.q = m.tiles + i * plan.tile_size;
    x.out = x.q + plan.depth * kTileRows;
    start_tile<T, Dot>(p, t, t.tile_begin + i, m.staged, &x);
    lo = x.rows.any.first < lo ? x.rows.any.first : lo;
    hi = x.rows.any.last > hi ? x.rows.any.last : hi;
  }
  for (int64_t j = lo / plan.keys * plan.keys; j < hi; j += plan.keys) {
    Block b;
    pack_block<T, Dot>(p, plan, t, j, j + plan.keys < hi ? j + plan.keys : hi, m, &b);
    for (int i = 0; i < count; ++i) {
      if (tiles[i].rows.vecs == 1) tile_block<T, Dot, 1>(p, plan, t, m, b, tiles[i]);
      if (tiles[i].rows.vecs == 2) tile_block<T, Dot, 2>(p, plan, t, m, b, tiles[i]);
      if (tiles[i].rows.vecs == 3) tile_block<T, Dot, 3>(p, plan, t, m, b, tiles[i]);
    }
  }
  for (int i = 0; i < count; ++i) finish_tile<T>(p, plan, t, tiles[i], m.logits);
}

// f<element, bf16 dot products>()
template <class F>
auto with_types(const AttentionForward& p, const F& f) {
  if (p.dtype == Dtype::f32) return f.template operator()<float, false>();
  if (p.dtype == Dtype::f16) return f.template operator()<fp16_t, false>();
#if defined(TENFOLD_ISA_BF16)
  return f.template operator()<bf16_t, true>();
#else
  return f.template operator()<bf16_t, false>();
#endif
}

}  // namespace

int64_t attention_tile_rows() {
  return kTileRows;
}

int64_t attention_most_tiles() {
  return kMostTiles;
}

int64_t attention_scratch(const AttentionForward& p) {
  return with_types(p, [&]<class T, bool Dot>() {
    const Plan plan = make_plan<Dot>(p);
    const int64_t packed = plan.keys * plan.depth + words<Dot>(plan.keys) * plan.value_pad;
    return (logits_size(plan) + 8 * longest_row(p) + packed + kMostTiles * plan.tile_size) * 4;
  });
}

void attention_forward_task(const AttentionForward& p, const AttentionTask& t, void* scratch) {
  with_types(p, [&]<class T, bool Dot>() { run_task<T, Dot>(p, t, scratch); });
}

TENFOLD_ISA_END
