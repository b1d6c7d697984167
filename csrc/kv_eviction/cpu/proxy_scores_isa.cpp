// CPU kernel of proxy_scores: one GEMM pass, nothing recomputed, K read in place.
//
// Lanes hold proxy rows, not keys: a tile is kTileRows rows x kTileKeys keys, its logits are built
// by broadcasting elements of k (natural layout, no packing) against the packed q^T of the tile. So
// row maxima and row sums are plain lane-wise operations. For each row tile:
//   1. over all key tiles: logits -> e = exp(l - m) with a running reference m per row, kept in
//      registers; e goes to a strip [L][kTileRows]; m is raised only when a logit exceeds it by
//      2^kSlack, and each key tile remembers which m it used;
//   2. lse = m + log(sum); each key adds  sum_rows e * exp(m_tile - m) / sum  to its column sum.
// With lse given, step 1 adds exp(l - lse) to the column sums at once and no strip exists.
// The strip is written and read once: 8 bytes per logit against 2 * D FLOPs.
#include "core/cpu/math.h"
#include "kv_eviction/proxy_scores.h"

TENFOLD_ISA_BEGIN
namespace {

// Register blocking: kVecs * kTileKeys accumulators + kVecs rows of q + a broadcast must fit the
// register file: 2 * 12 + 3 of 32 (AVX-512), 2 * 6 + 3 of 16 (AVX2).
constexpr int kVecs = 2;
#if defined(TENFOLD_ISA_AVX512)
constexpr int kTileKeys = 12;
#elif defined(TENFOLD_ISA_AVX2)
constexpr int kTileKeys = 6;
#else
constexpr int kTileKeys = 4;
#endif
constexpr int kTileRows = kVecs * kWidth;
constexpr float kSlack = 16.0f;     // log2 of the largest e; sums stay far from overflow
constexpr float kNothing = -1e30f;  // reference of a row that has seen no key yet
constexpr float kInf = __builtin_inff();

struct Scratch {
  float* q;         // packed q^T: [D][kTileRows] float, or [D / 2][kTileRows] pairs of bf16
  float* keys;      // [kTileKeys][D] float or bf16: converted, gathered or padded keys
  float* strip;     // [tiles * kTileKeys][kTileRows]
  float* refs;      // [tiles][kTileRows]: the distinct references m, in order of use
  int32_t* ref_of;  // [tiles]: which reference a key tile used
};

struct RowTile {
  int32_t lo[kTileRows], hi[kTileRows];  // visible keys of each row
  float* lse_out[kTileRows];             // where its lse goes; null for padding lanes
  float lse2[kTileRows];                 // lse in log2 units when given
  int32_t all_lo, all_hi;                // keys visible to every active row
  int32_t any_lo, any_hi;                // keys visible to some row
  int active;
};

inline int64_t round_up(int64_t x, int64_t m) {
  return (x + m - 1) / m * m;
}
inline int64_t num_tiles(int64_t length) {
  return (length + kTileKeys - 1) / kTileKeys + 1;
}

inline Scratch carve(const ProxyScoresParams& p, void* memory) {
  auto* at = static_cast<float*>(memory);
  Scratch s;
  s.q = at;
  at += round_up(p.head_dim, 2) * kTileRows;
  s.keys = at;
  at += kTileKeys * round_up(p.head_dim, 16);
  if (p.lse_in != nullptr) return s;
  s.refs = at;
  at += num_tiles(p.length) * kTileRows;
  s.strip = at;
  at += num_tiles(p.length) * kTileKeys * kTileRows;
  s.ref_of = reinterpret_cast<int32_t*>(at);
  return s;
}

inline bool use_dot(const ProxyScoresParams& p) {
#if defined(TENFOLD_ISA_BF16)
  return p.dtype == Dtype::bf16 && p.head_dim % 2 == 0;
#else
  (void)p;
  return false;
#endif
}

inline float to_float(const float* x) {
  return *x;
}
template <class T>
inline float to_float(const T* x) {
  float lanes[kWidth];
  store(lanes, load_n(x, 1));
  return lanes[0];
}

// q^T of one tile; missing rows are zero. With `pairs`, two neighbouring bf16 share a lane, else q
// is scaled here, so that the logits come out in log2 units (scaling them later would round the
// scale).
template <class T>
void pack_q(const T* const* rows, int64_t d, bool pairs, float scale, float* out) {
  if (pairs) {
    auto* to = reinterpret_cast<uint16_t*>(out);
    for (int r = 0; r < kTileRows; ++r) {
      const auto* from = reinterpret_cast<const uint16_t*>(rows[r]);
      for (int64_t i = 0; i < d; ++i)
        to[(i / 2 * kTileRows + r) * 2 + i % 2] = from != nullptr ? from[i] : 0;
    }
    return;
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int64_t i = 0; i < d; ++i)
      out[i * kTileRows + r] = rows[r] != nullptr ? to_float(rows[r] + i) * scale : 0.0f;
}

// Elements of one cache line: the rows of the next key tile are prefetched line by line while this
// tile is multiplied (K streams from L3 or memory; the hardware does not follow 12 rows at once).
constexpr int kLine = 16;
// Products summed in one chain before the partial sums are added: shorter chains round less.
constexpr int kChain = 64;

// acc[j][v] = sum_i k_j[i] * q[i][v]: the hot loop. Rows of k are `stride` elements apart; an
// element is a float (Multiply = fma) or a pair of bf16 (Multiply = dot product).
template <class Element, class Multiply>
inline void tile_product(const Element* k, int64_t stride, const float* q, int64_t d,
                         const Multiply& multiply, VF (&acc)[kTileKeys][kVecs]) {
  for (int64_t begin = 0; begin < d; begin += kChain) {
    const int64_t end = begin + kChain < d ? begin + kChain : d;
    VF part[kTileKeys][kVecs];
    for (auto& key : part)
      for (auto& a : key) a = set1(0.0f);
    for (int64_t i0 = begin; i0 < end; i0 += kLine) {
#pragma GCC unroll 16
      for (int j = 0; j < kTileKeys; ++j) __builtin_prefetch(k + (kTileKeys + j) * stride, 0, 3);
      const int64_t n = end - i0 < kLine ? end - i0 : kLine;
      for (int64_t i = 0; i < n; ++i, ++k, q += kTileRows) {
        VF rows[kVecs];
        for (int v = 0; v < kVecs; ++v) rows[v] = load(q + v * kWidth);
#pragma GCC unroll 16
        for (int j = 0; j < kTileKeys; ++j) multiply(k[j * stride], rows, part[j]);
      }
    }
    for (int j = 0; j < kTileKeys; ++j)
      for (int v = 0; v < kVecs; ++v) acc[j][v] = begin == 0 ? part[j][v] : acc[j][v] + part[j][v];
  }
}

inline void logits_f32(const float* k, int64_t stride, const float* q, int64_t d,
                       VF (&acc)[kTileKeys][kVecs]) {
  const auto multiply = [](float key, const VF(&rows)[kVecs], VF(&sums)[kVecs]) {
    const VF b = set1(key);
    for (int v = 0; v < kVecs; ++v) sums[v] = fma(b, rows[v], sums[v]);
  };
  tile_product(k, stride, q, d, multiply, acc);
}

#if defined(TENFOLD_ISA_BF16)
inline void logits_bf16(const uint32_t* k, int64_t stride, const float* q, int64_t pairs,
                        VF (&acc)[kTileKeys][kVecs]) {
  const auto multiply = [](uint32_t key, const VF(&rows)[kVecs], VF(&sums)[kVecs]) {
    const VI b = seti(key);
    for (int v = 0; v < kVecs; ++v) sums[v] = dot_bf16(sums[v], bits(rows[v]), b);
  };
  tile_product(k, stride, q, pairs, multiply, acc);
}
#endif

// Keys [j0, j0 + n) as float rows, zero-padded to kTileKeys rows of round_up(d, 16).
template <class T>
void stage_keys(const T* k, int64_t stride, int n, int64_t d, float* out) {
  const int64_t pitch = round_up(d, 16);
  for (int j = 0; j < kTileKeys; ++j, out += pitch) {
    int64_t i = 0;
    if (j < n) {
      for (; i + kWidth <= d; i += kWidth) store(out + i, load(k + j * stride + i));
      if (i < d) store(out + i, load_n(k + j * stride + i, static_cast<int>(d - i)));
    } else {
      for (; i < d; ++i) out[i] = 0.0f;
    }
  }
}

template <class T, bool kDot>
inline void tile_logits(const ProxyScoresParams& p, const T* k, int64_t j0, const Scratch& s,
                        VF (&acc)[kTileKeys][kVecs]) {
  const int64_t stride = p.k_stride[2], d = p.head_dim;
  const int n = static_cast<int>(p.length - j0 < kTileKeys ? p.length - j0 : kTileKeys);
  const T* rows = k + j0 * stride;
#if defined(TENFOLD_ISA_BF16)
  if constexpr (kDot) {
    if (n == kTileKeys && stride % 2 == 0) {
      logits_bf16(reinterpret_cast<const uint32_t*>(rows), stride / 2, s.q, d / 2, acc);
      return;
    }
    auto* staged = reinterpret_cast<uint16_t*>(s.keys);
    const int64_t pitch = round_up(d, 16);
    for (int j = 0; j < kTileKeys; ++j)
      for (int64_t i = 0; i < d; ++i) staged[j * pitch + i] = j < n ? rows[j * stride + i].bits : 0;
    logits_bf16(reinterpret_cast<const uint32_t*>(staged), pitch / 2, s.q, d / 2, acc);
    return;
  }
#endif
  if constexpr (sizeof(T) == 4) {
    if (n == kTileKeys) {
      logits_f32(rows, stride, s.q, d, acc);
      return;
    }
  }
  stage_keys(rows, stride, n, d, s.keys);
  logits_f32(s.keys, round_up(d, 16), s.q, d, acc);
}

inline bool needs_mask(const RowTile& rt, int64_t j0) {
  return j0 < rt.all_lo || j0 + kTileKeys > rt.all_hi;
}

// Where a row may not look, the value becomes `hidden` (-inf for logits, 0 for weights).
inline void mask_tile(const RowTile& rt, int64_t j0, VF hidden, VF (&acc)[kTileKeys][kVecs]) {
  for (int v = 0; v < kVecs; ++v) {
    const VI lo = load(reinterpret_cast<const uint32_t*>(rt.lo) + v * kWidth);
    const VI hi = load(reinterpret_cast<const uint32_t*>(rt.hi) + v * kWidth);
    for (int j = 0; j < kTileKeys; ++j) {
      const VI key = seti(static_cast<uint32_t>(j0 + j));
      acc[j][v] = select(lt(key, lo), hidden, select(lt(key, hi), acc[j][v], hidden));
    }
  }
}

// column[j] += sum over rows of e[j], for the first n keys of a tile.
inline void add_columns(const VF (&e)[kTileKeys], int64_t n, float* column) {
  float sums[(kTileKeys + 3) / 4 * 4];
  const VF zero = set1(0.0f);
  for (int j = 0; j < kTileKeys; j += 4)
    hsum4(e[j], j + 1 < kTileKeys ? e[j + 1] : zero, j + 2 < kTileKeys ? e[j + 2] : zero,
          j + 3 < kTileKeys ? e[j + 3] : zero, sums + j);
  if (n >= kTileKeys) {
    for (int j = 0; j < kTileKeys; ++j) column[j] += sums[j];
  } else {
    for (int j = 0; j < n; ++j) column[j] += sums[j];
  }
}

// Running state of one row tile over the key tiles: references m (log2 units) and sums of e.
struct Online {
  VF ref[kVecs], sum[kVecs];
  int num_refs;
};

// A logit in log2 units minus `ref`.
template <bool kDot>
inline VF relative(VF logit, VF to_log2, VF ref) {
  if constexpr (kDot) return fma(logit, to_log2, set1(0.0f) - ref);
  return logit - ref;
}

// Raises the references that `acc` exceeds by more than kSlack.
template <bool kDot>
inline void raise_refs(const VF (&acc)[kTileKeys][kVecs], VF to_log2, const Scratch& s, Online& o) {
  VF top[kVecs];
  bool raise = o.num_refs == 0;
  for (int v = 0; v < kVecs; ++v) {
    top[v] = acc[0][v];
    for (int j = 1; j < kTileKeys; ++j) top[v] = vmax(top[v], acc[j][v]);
    if constexpr (kDot) top[v] = top[v] * to_log2;
    raise |= any(gt(top[v] - set1(kSlack), o.ref[v]));
  }
  if (!raise) [[likely]]
    return;
  for (int v = 0; v < kVecs; ++v) {
    const VF ref = vmax(o.ref[v], top[v]);
    o.sum[v] = o.sum[v] * exp2(o.ref[v] - ref);
    o.ref[v] = ref;
    store(s.refs + static_cast<int64_t>(o.num_refs) * kTileRows + v * kWidth, ref);
  }
  ++o.num_refs;
}

template <class T, bool kDot>
Online exponentials(const ProxyScoresParams& p, const T* k, const RowTile& rt, const Scratch& s) {
  const VF to_log2 = set1(p.scale * kLog2e), zero = set1(0.0f);
  Online o;
  for (int v = 0; v < kVecs; ++v) o.ref[v] = set1(kNothing), o.sum[v] = zero;
  o.num_refs = 0;
  float* strip = s.strip;
  int32_t* ref_of = s.ref_of;
  for (int64_t j0 = rt.any_lo; j0 < rt.any_hi; j0 += kTileKeys) {
    VF acc[kTileKeys][kVecs];
    tile_logits<T, kDot>(p, k, j0, s, acc);
    if (needs_mask(rt, j0)) mask_tile(rt, j0, set1(-kInf), acc);
    raise_refs<kDot>(acc, to_log2, s, o);
    *ref_of++ = o.num_refs - 1;
    for (int v = 0; v < kVecs; ++v) {
      const VF ref = o.ref[v];
      VF sum = zero;  // of this tile only: shorter chains of additions round less
#pragma GCC unroll 16
      for (int j = 0; j < kTileKeys; ++j) {
        const VF e = exp2(relative<kDot>(acc[j][v], to_log2, ref));
        sum = sum + e;
        store(strip + j * kTileRows + v * kWidth, e);
      }
      o.sum[v] = o.sum[v] + sum;
    }
    strip += kTileKeys * kTileRows;
  }
  return o;
}

// Column sums from the strip: each tile's e times exp(m_tile - m) / sum of its rows.
void columns_from_strip(const ProxyScoresParams& p, const RowTile& rt, const Scratch& s,
                        const Online& o, const float* inverse_sum, float* partial) {
  const float* strip = s.strip;
  const int32_t* ref_of = s.ref_of;
  VF factor[kVecs] = {};
  int32_t loaded = -1;
  for (int64_t j0 = rt.any_lo; j0 < rt.any_hi; j0 += kTileKeys) {
    if (*ref_of != loaded) {
      loaded = *ref_of;
      for (int v = 0; v < kVecs; ++v) {
        const VF ref = load(s.refs + static_cast<int64_t>(loaded) * kTileRows + v * kWidth);
        factor[v] = exp2(ref - o.ref[v]) * load(inverse_sum + v * kWidth);
      }
    }
    ++ref_of;
    VF weight[kTileKeys][kVecs], column[kTileKeys];
    for (int j = 0; j < kTileKeys; ++j, strip += kTileRows)
      for (int v = 0; v < kVecs; ++v) weight[j][v] = load(strip + v * kWidth) * factor[v];
    // Hidden weights are 0 already, but for rows that are NaN.
    if (needs_mask(rt, j0)) mask_tile(rt, j0, set1(0.0f), weight);
    for (int j = 0; j < kTileKeys; ++j) {
      column[j] = weight[j][0];
      for (int v = 1; v < kVecs; ++v) column[j] = column[j] + weight[j][v];
    }
    add_columns(column, p.length - j0, partial + j0);
  }
}

template <class T, bool kDot>
void columns_given_lse(const ProxyScoresParams& p, const T* k, const RowTile& rt, const Scratch& s,
                       float* partial) {
  const VF to_log2 = set1(p.scale * kLog2e);
  VF lse[kVecs];
  for (int v = 0; v < kVecs; ++v) lse[v] = load(rt.lse2 + v * kWidth);
  for (int64_t j0 = rt.any_lo; j0 < rt.any_hi; j0 += kTileKeys) {
    VF acc[kTileKeys][kVecs], column[kTileKeys];
    tile_logits<T, kDot>(p, k, j0, s, acc);
    if (needs_mask(rt, j0)) mask_tile(rt, j0, set1(-kInf), acc);
    for (int j = 0; j < kTileKeys; ++j) {
      column[j] = exp2(relative<kDot>(acc[j][0], to_log2, lse[0]));
      for (int v = 1; v < kVecs; ++v)
        column[j] = column[j] + exp2(relative<kDot>(acc[j][v], to_log2, lse[v]));
    }
    add_columns(column, p.length - j0, partial + j0);
  }
}

// What each of the rows [row0, row0 + n) of a key head may see, and where its lse lives.
void describe_rows(const ProxyScoresParams& p, const ProxyScoresTask& t, int64_t row0, int n,
                   RowTile* rt) {
  const int32_t begin = p.kv_begin[t.b], end = p.kv_end[t.b];
  rt->active = 0;
  rt->all_lo = rt->any_hi = 0;
  rt->all_hi = rt->any_lo = static_cast<int32_t>(p.length);
  for (int r = 0; r < kTileRows; ++r) {
    rt->lo[r] = static_cast<int32_t>(p.length);
    rt->hi[r] = 0;
    rt->lse_out[r] = nullptr;
    rt->lse2[r] = kInf;
    if (r >= n) continue;
    const int64_t row = row0 + r, w = row % p.num_proxies;
    const int64_t head = p.head_list[p.head_begin[t.h] + row / p.num_proxies];
    const int64_t at = (t.b * p.q_heads + head) * p.num_proxies + w;
    if (p.lse_in == nullptr) rt->lse_out[r] = p.lse_out + at;
    const int32_t pos = p.positions[t.b * p.num_proxies + w];
    if (pos < begin || pos >= end) continue;
    const int64_t from_window = p.window >= 0 ? int64_t{pos} - p.window + 1 : begin;
    const auto lo = static_cast<int32_t>(from_window > begin ? from_window : begin);
    const int32_t hi = p.causal && pos + 1 < end ? pos + 1 : end;
    if (lo >= hi || (p.lse_in != nullptr && p.lse_in[at] == -kInf)) continue;
    ++rt->active;
    rt->lo[r] = lo;
    rt->hi[r] = hi;
    if (p.lse_in != nullptr) rt->lse2[r] = p.lse_in[at] * kLog2e;
    rt->all_lo = lo > rt->all_lo ? lo : rt->all_lo;
    rt->all_hi = hi < rt->all_hi ? hi : rt->all_hi;
    rt->any_lo = lo < rt->any_lo ? lo : rt->any_lo;
    rt->any_hi = hi > rt->any_hi ? hi : rt->any_hi;
  }
  // A tile with idle lanes is always masked: 0 * inf of such a lane must not reach a column.
  if (rt->active < kTileRows) rt->all_lo = static_cast<int32_t>(p.length);
}

// Natural lse of each row to the output; 1 / sum (0 for rows that see no key) to `inverse_sum`.
void finish_rows(const RowTile& rt, const Online& o, float* inverse_sum) {
  float ref[kTileRows], sum[kTileRows];
  for (int v = 0; v < kVecs; ++v) {
    store(ref + v * kWidth, o.ref[v]);
    store(sum + v * kWidth, o.sum[v]);
  }
  for (int r = 0; r < kTileRows; ++r) {
    // A sum of 0 means that every logit is -inf: such a row contributes 0, as one that sees
    // nothing.
    const bool sees = rt.lo[r] < rt.hi[r] && sum[r] != 0.0f;
    inverse_sum[r] = sees ? 1.0f / sum[r] : 0.0f;
    if (rt.lse_out[r] == nullptr) continue;
    const double lse = static_cast<double>(ref[r]) * 0.6931471805599453 +
                       __builtin_log(static_cast<double>(sum[r]));
    *rt.lse_out[r] = !sees ? -kInf : ref[r] == kInf ? kInf : static_cast<float>(lse);
  }
}

template <class T, bool kDot>
void run_task(const ProxyScoresParams& p, const ProxyScoresTask& t) {
  const Scratch s = carve(p, t.scratch);
  const T* q = static_cast<const T*>(p.q) + t.b * p.q_stride[0];
  const T* k = static_cast<const T*>(p.k) + t.b * p.k_stride[0] + t.h * p.k_stride[1];
  for (int64_t row0 = t.row_begin; row0 < t.row_end; row0 += kTileRows) {
    const int64_t left = t.row_end - row0;
    const int n = static_cast<int>(left < kTileRows ? left : kTileRows);
    RowTile rt;
    describe_rows(p, t, row0, n, &rt);
    const T* rows[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = row0 + r;
      const int64_t head = r < n ? p.head_list[p.head_begin[t.h] + row / p.num_proxies] : 0;
      rows[r] = rt.lo[r] < rt.hi[r] ? q + head * p.q_stride[1] + row % p.num_proxies * p.q_stride[2]
                                    : nullptr;
    }
    if (rt.active > 0) pack_q(rows, p.head_dim, kDot, p.scale * kLog2e, s.q);
    if (p.lse_in != nullptr) {
      if (rt.active > 0) columns_given_lse<T, kDot>(p, k, rt, s, t.partial);
      continue;
    }
    if (rt.active == 0) rt.any_lo = rt.any_hi = 0;
    const Online o = exponentials<T, kDot>(p, k, rt, s);
    float inverse_sum[kTileRows];
    finish_rows(rt, o, inverse_sum);
    columns_from_strip(p, rt, s, o, inverse_sum, t.partial);
  }
}

}  // namespace

int64_t proxy_scores_tile_rows() {
  return kTileRows;
}

int64_t proxy_scores_scratch(const ProxyScoresParams& p) {
  int64_t floats = round_up(p.head_dim, 2) * kTileRows + kTileKeys * round_up(p.head_dim, 16);
  if (p.lse_in == nullptr) floats += num_tiles(p.length) * (kTileRows + kTileKeys * kTileRows + 1);
  return round_up(floats * 4, 64);
}

void proxy_scores_task(const ProxyScoresParams& p, const ProxyScoresTask& t) {
  if (p.dtype == Dtype::f32) return run_task<float, false>(p, t);
  if (p.dtype == Dtype::f16) return run_task<fp16_t, false>(p, t);
#if defined(TENFOLD_ISA_BF16)
  if (use_dot(p)) return run_task<bf16_t, true>(p, t);
#endif
  run_task<bf16_t, false>(p, t);
}

TENFOLD_ISA_END
