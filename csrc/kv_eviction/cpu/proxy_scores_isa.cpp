// CPU kernel of proxy_scores: one GEMM pass, K read in place.
//
// Lanes hold proxy rows, not keys: a tile is kTileRows rows x kKeys keys, its logits are built
// by broadcasting elements of k (natural layout, no packing) against the packed q^T of the tile. So
// row maxima and row sums are plain lane-wise operations. For each group of row tiles:
//   1. over all key tiles: logits -> e = exp(l - m) with a running reference m per row, kept in
//      registers; e goes to a strip [L][kTileRows]; m is raised only when a logit exceeds it by
//      2^kSlack, and each key tile remembers which m it used;
//   2. lse = m + log(sum); each key adds  sum_rows e * exp(m_tile - m) / sum  to its column sum.
// With lse given, step 1 falls away: step 2 multiplies and adds exp(l - lse) at once.
// Traffic: the row tiles of a group take turns over a block of keys that stays in L2, so K comes
// once per group from where it lies; a strip is written and read once, 8 bytes per logit against
// 2 * D FLOPs. bf16 products by AMX cost less than that: they have no strip, step 2 multiplies
// again.
#include "core/cpu/math.h"
#include "kv_eviction/cpu/proxy_scores_rows.h"
#include "kv_eviction/cpu/proxy_scores_tile.h"
#include "kv_eviction/proxy_scores.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr float kSlack = 16.0f;     // log2 of the largest e; sums stay far from overflow
constexpr float kNothing = -1e30f;  // reference of a row that has seen no key yet

constexpr int kMaxGroup = 16;                       // row tiles
constexpr int64_t kStripBytes = int64_t{1} << 20;   // all strips of a group
constexpr int64_t kPackedBytes = int64_t{1} << 18;  // packed q of a group without strips
constexpr int64_t kBlockBytes = int64_t{96} << 10;  // keys that a group shares

// How a task is blocked, from shapes alone.
struct Plan {
  bool strip;
  int group;           // row tiles that share a block of keys
  int64_t block;       // keys of a block
  int64_t strip_size;  // floats of one strip
  int64_t num_tiles;   // key tiles
};

inline Plan make_plan(const ProxyScoresParams& p) {
  Plan plan{};
  const bool dot = use_dot(p);
  const int64_t keys = dot ? kDotKeys : kTileKeys;
  plan.num_tiles = (p.length + keys - 1) / keys + 1;
  plan.strip_size = plan.num_tiles * keys * kTileRows;
  plan.strip = p.lse_in == nullptr;
#if defined(TENFOLD_ISA_AMX)
  if (dot && plan.strip_size * 4 > kStripBytes) plan.strip = false;
#endif
  const int64_t tile_bytes = 4 * (plan.strip ? plan.strip_size : packed_q_size(p.head_dim));
  const int64_t fit = (plan.strip ? kStripBytes : kPackedBytes) / tile_bytes;
  plan.group = static_cast<int>(fit < 1 ? 1 : fit > kMaxGroup ? kMaxGroup : fit);
  const int64_t block = kBlockBytes / (p.head_dim * dtype_size(p.dtype)) / keys * keys;
  plan.block = block < 4 * keys ? 4 * keys : block;
  if (plan.group == 1) plan.block = plan.num_tiles * keys;
  return plan;
}

// Running state of one row tile over the key tiles: references m (log2 units) and sums of e.
struct Online {
  VF ref[kVecs], sum[kVecs];
  int num_refs;
};

// One row tile of a group with its memory.
struct Member {
  RowTile rows;
  Online state;
  TileScratch tile;
  float* strip;     // [key tiles * keys][kTileRows]
  float* refs;      // [key tiles][kTileRows]: the distinct references m, in order of use
  int32_t* ref_of;  // [key tiles]: which reference a key tile used
};

inline int64_t member_size(const ProxyScoresParams& p, const Plan& plan) {
  return packed_q_size(p.head_dim) +
         (plan.strip ? plan.strip_size + round_up(plan.num_tiles * (kTileRows + 1), 16) : 0);
}

inline void give_memory(const ProxyScoresParams& p, const Plan& plan, float* keys, float* at,
                        Member* m) {
  m->tile = {at, keys};
  if (!plan.strip) return;
  m->strip = at + packed_q_size(p.head_dim);
  m->refs = m->strip + plan.strip_size;
  m->ref_of = reinterpret_cast<int32_t*>(m->refs + plan.num_tiles * kTileRows);
}

// Keys [first, last) of the group's tile grid, which starts at `origin`.
struct Block {
  int64_t origin, first, last;
};

// The key tiles of a block that a row tile sees.
template <bool kDot>
inline Block visible(const Block& b, const RowTile& rt) {
  constexpr int64_t kNum = kKeys<kDot>;
  const int64_t lo = b.origin + (rt.any_lo - b.origin) / kNum * kNum;
  return {b.origin, lo > b.first ? lo : b.first, rt.any_hi < b.last ? rt.any_hi : b.last};
}

// A logit in log2 units minus `ref`.
template <bool kDot>
inline VF relative(VF logit, VF to_log2, VF ref) {
  if constexpr (kDot) return fma(logit, to_log2, set1(0.0f) - ref);
  return logit - ref;
}

// Raises the references that `acc` exceeds by more than kSlack.
template <bool kDot, bool kStrip>
inline void raise_refs(const VF (&acc)[kKeys<kDot>][kVecs], VF to_log2, float* refs, Online& o) {
  VF top[kVecs];
  bool raise = o.num_refs == 0;
  for (int v = 0; v < kVecs; ++v) {
    top[v] = acc[0][v];
    for (int j = 1; j < kKeys<kDot>; ++j) top[v] = vmax(top[v], acc[j][v]);
    if constexpr (kDot) top[v] = top[v] * to_log2;
    raise |= any(gt(top[v] - set1(kSlack), o.ref[v]));
  }
  if (!raise) [[likely]]
    return;
  for (int v = 0; v < kVecs; ++v) {
    const VF ref = vmax(o.ref[v], top[v]);
    o.sum[v] = o.sum[v] * exp2(o.ref[v] - ref);
    o.ref[v] = ref;
    if constexpr (kStrip)
      store(refs + static_cast<int64_t>(o.num_refs) * kTileRows + v * kWidth, ref);
  }
  ++o.num_refs;
}

// Step 1 for the key tiles of one row tile.
template <class T, bool kDot, bool kStrip>
void exponentials(const ProxyScoresParams& p, const T* k, const Block& block, Member& m) {
  const RowTile& rt = m.rows;
  const VF to_log2 = set1(p.scale * kLog2e), zero = set1(0.0f);
  const Block b = visible<kDot>(block, rt);
  const int64_t tile0 = (b.first - b.origin) / kKeys<kDot>;
  float* strip = kStrip ? m.strip + tile0 * kKeys<kDot> * kTileRows : nullptr;
  int32_t* ref_of = kStrip ? m.ref_of + tile0 : nullptr;
  Online o = m.state;
  const auto use = [&](int64_t j0, VF(&acc)[kKeys<kDot>][kVecs]) __attribute__((always_inline)) {
    if (needs_mask<kDot>(rt, j0)) mask_tile(rt, j0, set1(-kInf), acc);
    raise_refs<kDot, kStrip>(acc, to_log2, m.refs, o);
    if constexpr (kStrip) *ref_of++ = o.num_refs - 1;
    for (int v = 0; v < kVecs; ++v) {
      const VF ref = o.ref[v];
      VF sum = zero;  // of this tile only: shorter chains of additions round less
#pragma GCC unroll 16
      for (int j = 0; j < kKeys<kDot>; ++j) {
        const VF e = exp2(relative<kDot>(acc[j][v], to_log2, ref));
        sum = sum + e;
        if constexpr (kStrip) store(strip + j * kTileRows + v * kWidth, e);
      }
      o.sum[v] = o.sum[v] + sum;
    }
    if constexpr (kStrip) strip += kKeys<kDot> * kTileRows;
  };
  for_tiles<T, kDot>(p, k, b.first, b.last, m.tile, use);
  m.state = o;
}

// Column sums from the strip: each tile's e times exp(m_tile - m) / sum of its rows.
template <bool kDot>
void columns_from_strip(const ProxyScoresParams& p, const Block& block, const Member& m,
                        const float* inverse_sum, float* partial) {
  const Block b = visible<kDot>(block, m.rows);
  const int64_t tile0 = (b.first - b.origin) / kKeys<kDot>;
  const float* strip = m.strip + tile0 * kKeys<kDot> * kTileRows;
  const int32_t* ref_of = m.ref_of + tile0;
  VF factor[kVecs] = {};
  int32_t loaded = -1;
  for (int64_t j0 = b.first; j0 < b.last; j0 += kKeys<kDot>) {
    if (*ref_of != loaded) {
      loaded = *ref_of;
      for (int v = 0; v < kVecs; ++v) {
        const VF ref = load(m.refs + static_cast<int64_t>(loaded) * kTileRows + v * kWidth);
        factor[v] = exp2(ref - m.state.ref[v]) * load(inverse_sum + v * kWidth);
      }
    }
    ++ref_of;
    VF weight[kKeys<kDot>][kVecs];
    for (int j = 0; j < kKeys<kDot>; ++j, strip += kTileRows)
      for (int v = 0; v < kVecs; ++v) weight[j][v] = load(strip + v * kWidth) * factor[v];
    // Hidden weights are 0 already, but for rows that are NaN.
    if (needs_mask<kDot>(m.rows, j0)) mask_tile(m.rows, j0, set1(0.0f), weight);
    add_columns(weight, p.length - j0, partial + j0);
  }
}

// Column sums by multiplying (again): exp2(l - ref) * factor of each row.
template <class T, bool kDot>
void columns_by_product(const ProxyScoresParams& p, const T* k, const Block& block, const Member& m,
                        const float* factors, float* partial) {
  const VF to_log2 = set1(p.scale * kLog2e);
  VF ref[kVecs], factor[kVecs];
  for (int v = 0; v < kVecs; ++v) ref[v] = m.state.ref[v], factor[v] = load(factors + v * kWidth);
  const auto use = [&](int64_t j0, VF(&acc)[kKeys<kDot>][kVecs]) __attribute__((always_inline)) {
    for (int j = 0; j < kKeys<kDot>; ++j)
      for (int v = 0; v < kVecs; ++v)
        // A given lse may lie below the logits: 2^128 is inf on every ISA, more is not.
        acc[j][v] =
            exp2(vmin(set1(128.0f), relative<kDot>(acc[j][v], to_log2, ref[v]))) * factor[v];
    if (needs_mask<kDot>(m.rows, j0)) mask_tile(m.rows, j0, set1(0.0f), acc);
    add_columns(acc, p.length - j0, partial + j0);
  };
  const Block b = visible<kDot>(block, m.rows);
  for_tiles<T, kDot>(p, k, b.first, b.last, m.tile, use);
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
    const bool sees = rt.live[r] && sum[r] != 0.0f;
    inverse_sum[r] = sees ? 1.0f / sum[r] : 0.0f;
    if (rt.lse_out[r] == nullptr) continue;
    const double lse = static_cast<double>(ref[r]) * 0.6931471805599453 +
                       __builtin_log(static_cast<double>(sum[r]));
    *rt.lse_out[r] = !sees ? -kInf : ref[r] == kInf ? kInf : static_cast<float>(lse);
  }
}

// Describes and packs the rows [row0, row0 + n) of the task's key head.
template <class T, bool kDot>
void start_member(const ProxyScoresParams& p, const ProxyScoresTask& t, int64_t row0, int n,
                  Member* m) {
  const T* q = static_cast<const T*>(p.q) + t.b * p.q_stride[0];
  RowTile& rt = m->rows;
  describe_rows(p, t, row0, n, &rt);
  if (rt.active == 0) return;
  const T* rows[kTileRows];
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t row = row0 + (rt.live[r] ? r : rt.first_live);
    const int64_t head = p.head_list[p.head_begin[t.h] + row / p.num_proxies];
    rows[r] = q + head * p.q_stride[1] + row % p.num_proxies * p.q_stride[2];
  }
  pack_q(rows, p.head_dim, kDot, p.scale * kLog2e, m->tile.q);
  m->state.num_refs = 0;
  for (int v = 0; v < kVecs; ++v) {
    m->state.ref[v] = p.lse_in != nullptr ? load(rt.lse2 + v * kWidth) : set1(kNothing);
    m->state.sum[v] = set1(0.0f);
  }
}

template <class T, bool kDot>
void run_task(const ProxyScoresParams& p, const ProxyScoresTask& t) {
#if defined(TENFOLD_ISA_AMX)
  const AmxTiles tiles;
#endif
  const Plan plan = make_plan(p);
  const T* k = static_cast<const T*>(p.k) + t.b * p.k_stride[0] + t.h * p.k_stride[1];
  auto* keys = static_cast<float*>(t.scratch);
  Member members[kMaxGroup];
  for (int i = 0; i < plan.group; ++i)
    give_memory(p, plan, keys, keys + staged_keys_size(p.head_dim) + i * member_size(p, plan),
                &members[i]);
  for (int64_t row0 = t.row_begin; row0 < t.row_end;) {
    int count = 0;
    int64_t lo = p.length, hi = 0;
    for (; count < plan.group && row0 < t.row_end; ++count, row0 += kTileRows) {
      const int64_t left = t.row_end - row0;
      Member& m = members[count];
      start_member<T, kDot>(p, t, row0, static_cast<int>(left < kTileRows ? left : kTileRows), &m);
      if (m.rows.active == 0) continue;
      lo = m.rows.any_lo < lo ? m.rows.any_lo : lo;
      hi = m.rows.any_hi > hi ? m.rows.any_hi : hi;
    }
    const auto for_blocks = [&](const auto& use) {
      for (int64_t j = lo; j < hi; j += plan.block) {
        const Block block{lo, j, j + plan.block < hi ? j + plan.block : hi};
        for (int i = 0; i < count; ++i)
          if (members[i].rows.active > 0) use(block, i);
      }
    };
    if (p.lse_in == nullptr)
      for_blocks([&](const Block& block, int i) {
        if (plan.strip) {
          exponentials<T, kDot, true>(p, k, block, members[i]);
        } else {
          exponentials<T, kDot, false>(p, k, block, members[i]);
        }
      });
    float factors[kMaxGroup][kTileRows];
    for (int i = 0; i < count; ++i) {
      if (p.lse_in == nullptr) {
        finish_rows(members[i].rows, members[i].state, factors[i]);
      } else {
        for (int r = 0; r < kTileRows; ++r) factors[i][r] = members[i].rows.live[r] ? 1.0f : 0.0f;
      }
    }
    for_blocks([&](const Block& block, int i) {
      if (plan.strip) {
        columns_from_strip<kDot>(p, block, members[i], factors[i], t.partial);
      } else {
        columns_by_product<T, kDot>(p, k, block, members[i], factors[i], t.partial);
      }
    });
  }
}

}  // namespace

int64_t proxy_scores_tile_rows() {
  return kTileRows;
}

int64_t proxy_scores_scratch(const ProxyScoresParams& p) {
  const Plan plan = make_plan(p);
  const int64_t floats = staged_keys_size(p.head_dim) + plan.group * member_size(p, plan);
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
