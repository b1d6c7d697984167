// SPDX-License-Identifier: Apache-2.0
// Which keys the proxy rows of a tile may see, masks, and column sums. For ISA sources.
#pragma once

#include "kv_eviction/cpu/proxy_scores_tile.h"
#include "kv_eviction/proxy_scores.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr float kInf = __builtin_inff();

struct RowTile {
  int32_t lo[kTileRows], hi[kTileRows];  // visible keys of each row
  bool live[kTileRows];                  // sees keys; other lanes repeat a live row with weight 0
  int first_live;                        // the row that they repeat
  float* lse_out[kTileRows];             // where its lse goes; null for padding lanes
  float lse2[kTileRows];                 // lse in log2 units when given
  int32_t all_lo, all_hi;                // keys visible to every active row
  int32_t any_lo, any_hi;                // keys visible to some row
  int active;
};

// What each of the rows [row0, row0 + n) of a key head may see, and where its lse lives.
inline void describe_rows(const ProxyScoresParams& p, const ProxyScoresTask& t, int64_t row0, int n,
                          RowTile* rt) {
  const int32_t begin = p.kv_begin[t.b], end = p.kv_end[t.b];
  rt->active = 0;
  rt->all_lo = rt->any_hi = 0;
  rt->all_hi = rt->any_lo = static_cast<int32_t>(p.length);
  for (int r = 0; r < kTileRows; ++r) {
    rt->live[r] = false;
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
    if (rt->active++ == 0) rt->first_live = r;
    rt->live[r] = true;
    rt->lo[r] = lo;
    rt->hi[r] = hi;
    if (p.lse_in != nullptr) rt->lse2[r] = p.lse_in[at] * kLog2e;
    rt->all_lo = lo > rt->all_lo ? lo : rt->all_lo;
    rt->all_hi = hi < rt->all_hi ? hi : rt->all_hi;
    rt->any_lo = lo < rt->any_lo ? lo : rt->any_lo;
    rt->any_hi = hi > rt->any_hi ? hi : rt->any_hi;
  }
  if (rt->active == 0) {
    rt->any_lo = rt->any_hi = 0;
    return;
  }
  // A repeated row is finite wherever its original is, so its weight 0 leaves columns alone; zeros
  // as queries would not be, against keys that are inf, and a mask in every tile costs more.
  for (int r = 0; r < kTileRows; ++r)
    if (!rt->live[r]) {
      rt->lo[r] = rt->lo[rt->first_live];
      rt->hi[r] = rt->hi[rt->first_live];
    }
}

template <Product P>
inline bool needs_mask(const RowTile& rt, int64_t j0) {
  return j0 < rt.all_lo || j0 + kKeys<P> > rt.all_hi;
}

// Where a row may not look, the value becomes `hidden` (-inf for logits, 0 for weights).
__attribute__((noinline)) void mask_keys(const RowTile& rt, int64_t j0, int n, VF hidden,
                                         VF (*acc)[kVecs]) {
  for (int v = 0; v < kVecs; ++v) {
    const VI lo = load(reinterpret_cast<const uint32_t*>(rt.lo) + v * kWidth);
    const VI hi = load(reinterpret_cast<const uint32_t*>(rt.hi) + v * kWidth);
    for (int j = 0; j < n; ++j) {
      const VI key = seti(static_cast<uint32_t>(j0 + j));
      acc[j][v] = select(lt(key, lo), hidden, select(lt(key, hi), acc[j][v], hidden));
    }
  }
}

// column[j] += sum over rows of e[j], for the first n of kNum keys.
template <int kNum>
inline void add_columns(const VF (&e)[kNum][kVecs], int64_t n, float* column) {
  VF rows[(kNum + 3) / 4 * 4] = {};
  for (int j = 0; j < kNum; ++j) {
    rows[j] = e[j][0];
    for (int v = 1; v < kVecs; ++v) rows[j] = rows[j] + e[j][v];
  }
  float sums[(kNum + 3) / 4 * 4];
  for (int j = 0; j < kNum; j += 4) hsum4(rows[j], rows[j + 1], rows[j + 2], rows[j + 3], sums + j);
  if (n >= kNum) {
    for (int j = 0; j < kNum; ++j) column[j] += sums[j];
  } else {
    for (int j = 0; j < n; ++j) column[j] += sums[j];
  }
}

}  // namespace
TENFOLD_ISA_END
