// SPDX-License-Identifier: Apache-2.0
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
// 2 * D FLOPs. bf16 products by AMX cost less than a strip that leaves L2: there step 2 multiplies
// again. With AMX, float32 is split in bf16 parts (amx_split.h), the keys of a block once per
// group.
#include "core/cpu/math.h"
#include "kv_eviction/cpu/proxy_scores_amx.h"
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
// Splitting keys costs as much as the product of one or two row tiles with them: more tiles share
// them, though their strips leave L2.
constexpr int64_t kSplitStripBytes = int64_t{7} << 19;
constexpr int kLeastSplit = 3;

// How a task is blocked, from shapes alone.
struct Plan {
  Product product;
  bool strip;
  int group;            // row tiles that share a block of keys
  int64_t block;        // keys of a block
  int64_t strip_size;   // floats of one strip
  int64_t num_tiles;    // key tiles
  int64_t panels_size;  // floats of the split keys of a block and their flags
};

inline Plan make_plan(const ProxyScoresParams& p) {
  Plan plan{};
  plan.product = product_of(p);
  const int64_t keys = plan.product == Product::fma ? kTileKeys : kDotKeys;
  plan.num_tiles = (p.length + keys - 1) / keys + 1;
  plan.strip_size = plan.num_tiles * keys * kTileRows;
  plan.strip = p.lse_in == nullptr;
  if (kAmx && plan.product == Product::dot && plan.strip_size * 4 > kStripBytes) plan.strip = false;
  const bool split = plan.product == Product::split;
  const int64_t room = !plan.strip ? kPackedBytes : split ? kSplitStripBytes : kStripBytes;
  const int64_t fit = room / (4 * (plan.strip ? plan.strip_size : packed_q_size(p)));
  const int64_t least = split ? kLeastSplit : 1, wanted = fit > least ? fit : least;
  const int64_t rows = p.q_heads * p.num_proxies, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t most = tiles < kMaxGroup ? tiles : kMaxGroup;
  plan.group = static_cast<int>(wanted < most ? wanted : most);
  const int64_t block = kBlockBytes / (p.head_dim * dtype_size(p.dtype)) / keys * keys;
  plan.block = block < 4 * keys ? 4 * keys : block;
  if (plan.group == 1 && !split) plan.block = plan.num_tiles * keys;
#if defined(TENFOLD_ISA_AMX)
  const int64_t panels = plan.block / keys;
  if (split)
    plan.panels_size = (panels * split_panel_bytes(p.head_dim) + round_up(4 * panels, 64)) / 4;
#endif
  return plan;
}

// One row tile of a group with its memory, and its running state over the key tiles: references m
// (log2 units) and sums of e.
struct Member {
  RowTile rows;
  PackedRows packed;
  VF ref[kVecs], sum[kVecs];
  int num_refs;
  float* strip;             // [key tiles * keys][kTileRows]
  float* refs;              // [key tiles][kTileRows]: the distinct references m, in order of use
  int32_t* ref_of;          // [key tiles]: which reference a key tile used
  float factor[kTileRows];  // of each row's e in the column sums
};

inline int64_t member_size(const ProxyScoresParams& p, const Plan& plan) {
  return packed_q_size(p) +
         (plan.strip ? plan.strip_size + round_up(plan.num_tiles * (kTileRows + 1), 16) : 0);
}

inline void give_memory(const ProxyScoresParams& p, const Plan& plan, float* at, Member* m) {
  m->packed.packed = at;
  if (!plan.strip) return;
  m->strip = at + packed_q_size(p);
  m->refs = m->strip + plan.strip_size;
  m->ref_of = reinterpret_cast<int32_t*>(m->refs + plan.num_tiles * kTileRows);
}

// Keys [first, last) of the group's tile grid, which starts at `origin`; its row tiles.
struct Block {
  int64_t origin, first, last;
  Member* members;
  int count;
};

// The key tiles of a block that a row tile sees: first key and end.
struct Span {
  int64_t first, last;
};
template <Product P>
inline Span visible(const Block& b, const RowTile& rt) {
  constexpr int64_t kNum = kKeys<P>;
  const int64_t lo = b.origin + (rt.any_lo - b.origin) / kNum * kNum;
  return {lo > b.first ? lo : b.first, rt.any_hi < b.last ? rt.any_hi : b.last};
}

// All (row tile, key tile) of a block, one after another.
template <Product P>
class Pairs {
 public:
  explicit Pairs(const Block& b) : b_(b) { find(); }
  explicit operator bool() const { return i_ < b_.count; }
  Member& member() const { return b_.members[i_]; }
  int64_t key() const { return key_; }
  void next() {
    key_ += kKeys<P>;
    if (key_ < last_) return;
    ++i_;
    find();
  }

 private:
  void find() {
    for (; i_ < b_.count; ++i_) {
      if (member().rows.active == 0) continue;
      const Span span = visible<P>(b_, member().rows);
      key_ = span.first;
      last_ = span.last;
      if (key_ < last_) return;
    }
  }

  Block b_;
  int i_ = 0;
  int64_t key_ = 0, last_ = 0;
};

// A logit in log2 units minus `ref`.
template <Product P>
inline VF relative(VF logit, VF to_log2, VF ref) {
  if constexpr (P == Product::dot) return fma(logit, to_log2, set1(0.0f) - ref);
  return logit - ref;
}

// Multiplies every pair of a block and works on the logits: use.start(member, j0, tile), then
// use.keys<n>(j, ...) for n keys at a time, then use.finish().
template <class T, Product P, class Use>
inline void for_pairs(KeySource& s, const Block& b, Use& use) {
  Pairs<P> pairs(b);
  if constexpr (P == Product::fma || !kAmx) {
    for (; pairs; pairs.next()) {
      VF acc[kKeys<P>][kVecs];
      tile_logits<T, P>(s, pairs.member().packed, pairs.key(), acc);
      use.start(pairs.member(), pairs.key(), acc);
      use.template keys<kKeys<P>>(pairs.key(), acc);
      use.finish();
    }
  } else {
#if defined(TENFOLD_ISA_AMX)
    for_amx_pairs<P>(s, pairs, use);
#endif
  }
}

// The largest of n logits of each lane; a NaN is anything.
template <int n>
inline __attribute__((always_inline)) VF top_of(VF (*acc)[kVecs], int v) {
  constexpr int kChains = n % 4 == 0 ? 4 : 2;  // one chain would be 4 n cycles
  VF top[kChains];
#pragma GCC unroll 32
  for (int j = 0; j < n; ++j)
    top[j % kChains] = j < kChains ? acc[j][v] : vmax(top[j % kChains], acc[j][v]);
  for (int i = 1; i < kChains; ++i) top[0] = vmax(top[0], top[i]);
  return top[0];
}

// Step 1.
template <Product P, bool kStrip>
struct Exponentials {
  VF to_log2;
  int64_t origin;
  Member* m = nullptr;
  float* strip = nullptr;
  VF ref[kVecs] = {}, sum[kVecs] = {};  // sum of this tile only: shorter chains round less

  inline __attribute__((always_inline)) void start(Member& member, int64_t j0, VF (*acc)[kVecs]) {
    m = &member;
    if (needs_mask<P>(m->rows, j0)) mask_keys(m->rows, j0, kKeys<P>, set1(-kInf), acc);
    VF top[kVecs];
    bool raise = m->num_refs == 0;
    for (int v = 0; v < kVecs; ++v) {
      top[v] = top_of<kKeys<P>>(acc, v);
      if constexpr (P == Product::dot) top[v] = top[v] * to_log2;
      raise |= any(gt(top[v] - set1(kSlack), m->ref[v]));
      sum[v] = set1(0.0f);
    }
    if (raise) [[unlikely]]
      raise_refs(top);
    for (int v = 0; v < kVecs; ++v) ref[v] = m->ref[v];
    if constexpr (kStrip) {
      m->ref_of[(j0 - origin) / kKeys<P>] = m->num_refs - 1;
      strip = m->strip + (j0 - origin) * kTileRows;
    }
  }

  // The references that `top` exceeds by more than kSlack (and those of its neighbours).
  __attribute__((noinline)) void raise_refs(const VF (&top)[kVecs]) {
    for (int v = 0; v < kVecs; ++v) {
      const VF raised = vmax(m->ref[v], top[v]);
      m->sum[v] = m->sum[v] * exp2(m->ref[v] - raised);
      m->ref[v] = raised;
      if constexpr (kStrip)
        store(m->refs + static_cast<int64_t>(m->num_refs) * kTileRows + v * kWidth, raised);
    }
    ++m->num_refs;
  }

  template <int kNum>
  inline __attribute__((always_inline)) void keys(int64_t, VF (*acc)[kVecs]) {
#pragma GCC unroll 16
    for (int j = 0; j < kNum; ++j)
      for (int v = 0; v < kVecs; ++v) {
        const VF e = exp2(relative<P>(acc[j][v], to_log2, ref[v]));
        sum[v] = sum[v] + e;
        if constexpr (kStrip) store(strip + j * kTileRows + v * kWidth, e);
      }
    if constexpr (kStrip) strip += kNum * kTileRows;
  }

  inline __attribute__((always_inline)) void finish() {
    for (int v = 0; v < kVecs; ++v) m->sum[v] = m->sum[v] + sum[v];
  }
};

// Step 2 from the strip: each tile's e times exp(m_tile - m) / sum of its rows.
template <Product P>
void columns_from_strip(const ProxyScoresParams& p, const Block& block, const Member& m,
                        float* partial) {
  constexpr int kNum = kKeys<P> % 4 == 0 ? 4 : kKeys<P>;  // keys at a time
  const Span b = visible<P>(block, m.rows);
  VF factor[kVecs] = {};
  int32_t loaded = -1;
  const float* strip = m.strip + (b.first - block.origin) * kTileRows;
  for (int64_t j0 = b.first; j0 < b.last; j0 += kKeys<P>) {
    const int32_t ref_of = m.ref_of[(j0 - block.origin) / kKeys<P>];
    if (ref_of != loaded) {
      loaded = ref_of;
      for (int v = 0; v < kVecs; ++v) {
        const VF ref = load(m.refs + static_cast<int64_t>(loaded) * kTileRows + v * kWidth);
        factor[v] = exp2(ref - m.ref[v]) * load(m.factor + v * kWidth);
      }
    }
    const bool mask = needs_mask<P>(m.rows, j0);
    for (int j = 0; j < kKeys<P>; j += kNum, strip += kNum * kTileRows) {
      VF weight[kNum][kVecs];
#pragma GCC unroll 16
      for (int i = 0; i < kNum; ++i)
        for (int v = 0; v < kVecs; ++v)
          weight[i][v] = load(strip + i * kTileRows + v * kWidth) * factor[v];
      // Hidden weights are 0 already, but for rows that are NaN.
      if (mask) mask_keys(m.rows, j0 + j, kNum, set1(0.0f), weight);
      add_columns(weight, p.length - j0 - j, partial + j0 + j);
    }
  }
}

// Step 2 by multiplying (again): exp2(l - ref) * factor of each row.
template <Product P>
struct Columns {
  VF to_log2;
  int64_t length;
  float* partial;
  const Member* m = nullptr;
  VF ref[kVecs] = {}, factor[kVecs] = {};
  bool mask = false;

  inline __attribute__((always_inline)) void start(const Member& member, int64_t j0,
                                                   VF (*)[kVecs]) {
    m = &member;
    mask = needs_mask<P>(m->rows, j0);
    for (int v = 0; v < kVecs; ++v) ref[v] = m->ref[v], factor[v] = load(m->factor + v * kWidth);
  }

  template <int kNum>
  inline __attribute__((always_inline)) void keys(int64_t j0, VF (*acc)[kVecs]) {
    VF weight[kNum][kVecs];
#pragma GCC unroll 16
    for (int j = 0; j < kNum; ++j)
      for (int v = 0; v < kVecs; ++v)
        // A given lse may lie below the logits: 2^128 is inf on every ISA, more is not.
        weight[j][v] =
            exp2(vmin(set1(128.0f), relative<P>(acc[j][v], to_log2, ref[v]))) * factor[v];
    if (mask) mask_keys(m->rows, j0, kNum, set1(0.0f), weight);
    add_columns(weight, length - j0, partial + j0);
  }

  void finish() {}
};

// Natural lse of each row to the output; 1 / sum (0 for rows that see no key) as its factor.
void finish_rows(Member& m) {
  float ref[kTileRows], sum[kTileRows];
  for (int v = 0; v < kVecs; ++v) {
    store(ref + v * kWidth, m.ref[v]);
    store(sum + v * kWidth, m.sum[v]);
  }
  for (int r = 0; r < kTileRows; ++r) {
    // A sum of 0 means that every logit is -inf: such a row contributes 0, as one that sees
    // nothing.
    const bool sees = m.rows.live[r] && sum[r] != 0.0f;
    m.factor[r] = sees ? 1.0f / sum[r] : 0.0f;
    if (m.rows.lse_out[r] == nullptr) continue;
    const double lse = static_cast<double>(ref[r]) * 0.6931471805599453 +
                       __builtin_log(static_cast<double>(sum[r]));
    *m.rows.lse_out[r] = !sees ? -kInf : ref[r] == kInf ? kInf : static_cast<float>(lse);
  }
}

// Describes and packs the rows [row0, row0 + n) of the task's key head.
template <class T, Product P>
void start_member(const ProxyScoresParams& p, const ProxyScoresTask& t, int64_t row0, int n,
                  Member* m) {
  const T* q = static_cast<const T*>(p.q) + t.b * p.q_stride[0];
  RowTile& rt = m->rows;
  describe_rows(p, t, row0, n, &rt);
  if (rt.active == 0) return;
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t row = row0 + (rt.live[r] ? r : rt.first_live);
    const int64_t head = p.head_list[p.head_begin[t.h] + row / p.num_proxies];
    m->packed.row[r] = q + head * p.q_stride[1] + row % p.num_proxies * p.q_stride[2];
  }
  m->packed.scale = p.scale * kLog2e;
  pack_rows<T, P>(p.head_dim, &m->packed);
  m->num_refs = 0;
  for (int v = 0; v < kVecs; ++v) {
    m->ref[v] = p.lse_in != nullptr ? load(rt.lse2 + v * kWidth) : set1(kNothing);
    m->sum[v] = set1(0.0f);
  }
  for (int r = 0; r < kTileRows; ++r) m->factor[r] = rt.live[r] ? 1.0f : 0.0f;
}

template <class T, Product P>
void run_task(const ProxyScoresParams& p, const ProxyScoresTask& t) {
#if defined(TENFOLD_ISA_AMX)
  const AmxTiles amx;
#endif
  const Plan plan = make_plan(p);
  KeySource s{};
  s.k = static_cast<const T*>(p.k) + t.b * p.k_stride[0] + t.h * p.k_stride[1];
  s.stride = p.k_stride[2], s.length = p.length, s.depth = p.head_dim;
  auto* at = static_cast<float*>(t.scratch);
  s.staged = at;
  at += staged_keys_size(p.head_dim);
#if defined(TENFOLD_ISA_AMX)
  s.panels = reinterpret_cast<char*>(at);
  s.unsplit =
      reinterpret_cast<uint32_t*>(s.panels + plan.block / kDotKeys * split_panel_bytes(s.depth));
  at += plan.panels_size;
#endif
  Member members[kMaxGroup];
  for (int i = 0; i < plan.group; ++i)
    give_memory(p, plan, at + i * member_size(p, plan), &members[i]);
  const int64_t tiles = (t.row_end - t.row_begin + kTileRows - 1) / kTileRows;
  const int64_t groups = (tiles + plan.group - 1) / plan.group;
  const int64_t group = groups > 0 ? (tiles + groups - 1) / groups : 0;  // none is left with few
  for (int64_t row0 = t.row_begin; row0 < t.row_end;) {
    int count = 0;
    int64_t lo = p.length, hi = 0;
    for (; count < group && row0 < t.row_end; ++count, row0 += kTileRows) {
      const int64_t left = t.row_end - row0;
      Member& m = members[count];
      start_member<T, P>(p, t, row0, static_cast<int>(left < kTileRows ? left : kTileRows), &m);
      if (m.rows.active == 0) continue;
      lo = m.rows.any_lo < lo ? m.rows.any_lo : lo;
      hi = m.rows.any_hi > hi ? m.rows.any_hi : hi;
    }
    const VF to_log2 = set1(p.scale * kLog2e);
    const auto for_blocks = [&]([[maybe_unused]] bool multiply, const auto& use) {
      for (int64_t j = lo; j < hi; j += plan.block) {
        const Block block{lo, j, j + plan.block < hi ? j + plan.block : hi, members, count};
#if defined(TENFOLD_ISA_AMX)
        if (P == Product::split && multiply) {
          split_keys(s, block.first, block.last);
          s.fetch = block.last;
          s.fetch_end = block.last + plan.block < hi ? block.last + plan.block : hi;
          s.fetch_step = (kDotKeys + count - 1) / count;
        }
#endif
        use(block);
      }
    };
    if (p.lse_in == nullptr) {
      for_blocks(true, [&](const Block& block) {
        if (plan.strip) {
          Exponentials<P, true> use{to_log2, lo};
          for_pairs<T, P>(s, block, use);
        } else {
          Exponentials<P, false> use{to_log2, lo};
          for_pairs<T, P>(s, block, use);
        }
      });
      for (int i = 0; i < count; ++i) finish_rows(members[i]);
    }
    for_blocks(!plan.strip, [&](const Block& block) {
      if (plan.strip) {
        for (int i = 0; i < count; ++i)
          if (members[i].rows.active > 0) columns_from_strip<P>(p, block, members[i], t.partial);
      } else {
        Columns<P> use{to_log2, p.length, t.partial};
        for_pairs<T, P>(s, block, use);
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
  const int64_t floats =
      staged_keys_size(p.head_dim) + plan.panels_size + plan.group * member_size(p, plan);
  return round_up(floats * 4, 64);
}

void proxy_scores_task(const ProxyScoresParams& p, const ProxyScoresTask& t) {
  if (p.dtype == Dtype::f16) return run_task<fp16_t, Product::fma>(p, t);
#if defined(TENFOLD_ISA_AMX)
  if (p.dtype == Dtype::f32) return run_task<float, Product::split>(p, t);
#endif
#if defined(TENFOLD_ISA_BF16)
  if (product_of(p) == Product::dot) return run_task<bf16_t, Product::dot>(p, t);
#endif
  if (p.dtype == Dtype::f32) return run_task<float, Product::fma>(p, t);
  run_task<bf16_t, Product::fma>(p, t);
}

TENFOLD_ISA_END
