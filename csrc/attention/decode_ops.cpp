// SPDX-License-Identifier: Apache-2.0
// Schemas of dha_decode and dha_cache_append_ (the only ones), and their argument checks.
#include "attention/decode_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "attention/head_maps.h"
#include "core/dispatch.h"

namespace tenfold {
namespace {

constexpr int64_t kMaxLength = int64_t{1} << 30;
constexpr int64_t kMaxSplits = int64_t{1} << 20;

void check_batch_ints(const char* op, const char* arg, const Tensor& t, const Tensor& q) {
  check_int_dtype(op, arg, t);
  check_same_device(op, "q", q, arg, t);
  check_sizes(op, arg, t, {q.sizes()[0]}, "[B]");
}

CacheStrides cache_strides(const Tensor& t, CacheLayout layout) {
  const auto s = t.strides();
  if (layout == CacheLayout::ragged) return {0, s[0], s[1]};
  return layout == CacheLayout::paged ? CacheStrides{s[0], s[1], s[2]}
                                      : CacheStrides{s[0], s[2], s[1]};
}

// The two caches agree with each other and have the axes of the layout.
void check_caches(const char* op, const Tensor& k, const Tensor& v, CacheLayout layout) {
  const bool ragged = layout == CacheLayout::ragged, paged = layout == CacheLayout::paged;
  const char* k_axes = ragged ? "[N, HK, D]" : paged ? "[blocks, block, HK, D]" : "[B, HK, L, D]";
  const char* v_axes = ragged  ? "[N, HV, DV]"
                       : paged ? "[blocks, block, HV, DV]"
                               : "[B, HV, L, DV]";
  check_float_dtype(op, "k_cache", k);
  check_same_device(op, "k_cache", k, "v_cache", v);
  check_same_dtype(op, "k_cache", k, "v_cache", v);
  check_dim(op, "k_cache", k, ragged ? 3 : 4, k_axes);
  check_dim(op, "v_cache", v, ragged ? 3 : 4, v_axes);
  const int64_t tokens = layout == CacheLayout::contiguous ? 2 : 1;
  const bool same =
      k.sizes()[0] == v.sizes()[0] && (ragged || k.sizes()[tokens] == v.sizes()[tokens]);
  TENFOLD_CHECK_VALUE(same, "tenfold::", op, ": k_cache ", k_axes, " and v_cache ", v_axes,
                      " must hold the same tokens, got ", shape_str(k), " and ", shape_str(v));
  for (const Tensor* t : {&k, &v}) {
    const int64_t d = t->sizes()[t->dim() - 1];
    TENFOLD_CHECK_VALUE(d >= 1 && d <= kMaxDhaHeadDim, "tenfold::", op,
                        ": head dims D and DV must be in [1, ", kMaxDhaHeadDim, "], got k_cache ",
                        shape_str(k), " and v_cache ", shape_str(v));
    for (int64_t i = 0; i < t->dim(); ++i)
      TENFOLD_CHECK_VALUE(t->sizes()[i] <= kMaxLength, "tenfold::", op, ": sizes up to ",
                          kMaxLength, " are supported, got ", shape_str(*t));
  }
}

CacheLayout decode_layout(const char* op, const DhaDecodeArgs& a) {
  TENFOLD_CHECK_VALUE(!a.block_table || !a.offsets, "tenfold::", op,
                      ": block_table (paged cache) and offsets (ragged cache) exclude each other");
  TENFOLD_CHECK_VALUE(
      !a.kv_start || !a.offsets, "tenfold::", op,
      ": kv_start is for contiguous and paged caches; in a ragged cache offsets say "
      "where a sequence starts");
  if (a.offsets) return CacheLayout::ragged;
  return a.block_table ? CacheLayout::paged : CacheLayout::contiguous;
}

void check_queries(const char* op, const Tensor& q, const Tensor& k, CacheLayout layout) {
  check_float_dtype(op, "q", q);
  check_same_device(op, "q", q, "k_cache", k);
  check_same_dtype(op, "q", q, "k_cache", k);
  TENFOLD_CHECK_VALUE(q.dim() == 3 || q.dim() == 4, "tenfold::", op,
                      ": q must be [B, H, D] or [B, H, Sq, D], got shape ", shape_str(q));
  TENFOLD_CHECK_VALUE(q.dim() == 3 || q.sizes()[2] <= kMaxDhaQueries, "tenfold::", op,
                      ": Sq must be <= ", kMaxDhaQueries, ", got q ", shape_str(q));
  TENFOLD_CHECK_VALUE(q.sizes()[q.dim() - 1] == k.sizes()[k.dim() - 1], "tenfold::", op,
                      ": q and k_cache must agree in D, got q ", shape_str(q), " and k_cache ",
                      shape_str(k));
  TENFOLD_CHECK_VALUE(layout != CacheLayout::contiguous || q.sizes()[0] == k.sizes()[0],
                      "tenfold::", op, ": q and k_cache [B, HK, L, D] must agree in B, got q ",
                      shape_str(q), " and k_cache ", shape_str(k));
}

void check_indices(const char* op, const Tensor& q, const Tensor& k, const Tensor& kv_lens,
                   const DhaDecodeArgs& a) {
  check_batch_ints(op, "kv_lens", kv_lens, q);
  if (a.kv_start) check_batch_ints(op, "kv_start", *a.kv_start, q);
  if (a.offsets) {
    check_int_dtype(op, "offsets", *a.offsets);
    check_same_device(op, "q", q, "offsets", *a.offsets);
    check_sizes(op, "offsets", *a.offsets, {q.sizes()[0] + 1}, "[B + 1]");
  }
  if (a.block_table) {
    check_int_dtype(op, "block_table", *a.block_table);
    check_same_device(op, "q", q, "block_table", *a.block_table);
    check_dim(op, "block_table", *a.block_table, 2, "[B, max_blocks]");
    const int64_t width = a.block_table->sizes()[1];
    check_sizes(op, "block_table", *a.block_table, {q.sizes()[0], width}, "[B, max_blocks]");
    TENFOLD_CHECK_VALUE(k.sizes()[1] > 0 && width * k.sizes()[1] <= kMaxLength, "tenfold::", op,
                        ": block_table holds ", width, " blocks of ", k.sizes()[1],
                        " tokens; blocks must not be empty and at most ", kMaxLength,
                        " tokens are supported");
  }
  const int64_t block = a.block_table ? k.sizes()[1] : 0;
  TENFOLD_CHECK_VALUE(a.block_size == 0 || a.block_size == block, "tenfold::", op,
                      ": block_size must be 0 or the cache's (", block,
                      a.block_table ? ")" : ", there is no block_table)", ", got ", a.block_size);
}

void check_scalars(const char* op, const DhaDecodeArgs& a) {
  check_logit_options(op, a.scale, a.softcap, a.window_left);
  TENFOLD_CHECK_VALUE(a.num_splits >= 0 && a.num_splits <= kMaxSplits, "tenfold::", op,
                      ": num_splits must be 0 (chosen) or in [1, ", kMaxSplits, "], got ",
                      a.num_splits);
}

}  // namespace

DhaDecodeParams check_dha_decode(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& kmap, const Tensor& vmap, const Tensor& kv_lens,
                                 const DhaDecodeArgs& a) {
  constexpr auto op = "dha_decode";
  const CacheLayout layout = decode_layout(op, a);
  check_caches(op, k, v, layout);
  check_queries(op, q, k, layout);
  check_head_map(op, "kmap", kmap, q);
  check_head_map(op, "vmap", vmap, q);
  check_indices(op, q, k, kv_lens, a);
  check_scalars(op, a);
  const auto s = q.strides();
  const bool one = q.dim() == 3, paged = layout == CacheLayout::paged;
  const int64_t heads_at = layout == CacheLayout::contiguous ? 1 : k.dim() - 2;
  const int64_t d = q.sizes()[q.dim() - 1];
  DhaDecodeParams p{};
  p.layout = layout;
  p.k = cache_strides(k, layout), p.v = cache_strides(v, layout);
  p.q_batch = s[0], p.q_head = s[1], p.q_query = one ? 0 : s[2], p.q_dim = s[q.dim() - 1];
  p.batch = q.sizes()[0], p.q_heads = q.sizes()[1], p.num_queries = one ? 1 : q.sizes()[2];
  p.k_heads = k.sizes()[heads_at], p.v_heads = v.sizes()[heads_at];
  p.head_dim = d, p.value_dim = v.sizes()[v.dim() - 1];
  p.length = paged                           ? a.block_table->sizes()[1] * k.sizes()[1]
             : layout == CacheLayout::ragged ? k.sizes()[0]
                                             : k.sizes()[2];
  p.block_size = paged ? k.sizes()[1] : 0, p.num_blocks = paged ? k.sizes()[0] : 0;
  p.window_left = std::min(a.window_left, kMaxLength), p.num_splits = a.num_splits;
  p.scale = static_cast<float>(a.scale.value_or(1.0 / std::sqrt(static_cast<double>(d))));
  p.softcap = static_cast<float>(a.softcap);
  p.dtype = to_dtype(q.scalar_type());
  return p;
}

namespace {

void check_new_tokens(const char* op, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                      const Tensor& v, CacheLayout layout) {
  const int64_t heads_at = layout == CacheLayout::contiguous ? 1 : k_cache.dim() - 2;
  const auto kc = k_cache.sizes(), vc = v_cache.sizes();
  const std::pair<const char*, const Tensor*> tensors[] = {{"k", &k}, {"v", &v}};
  for (const auto& [name, t] : tensors) {
    check_same_device(op, "k_cache", k_cache, name, *t);
    check_same_dtype(op, "k_cache", k_cache, name, *t);
  }
  check_dim(op, "k", k, 4, "[B, HK, S, D]");
  check_dim(op, "v", v, 4, "[B, HV, S, DV]");
  const auto ks = k.sizes();
  check_sizes(op, "k", k, {ks[0], kc[heads_at], ks[2], kc[k_cache.dim() - 1]},
              "[B, HK, S, D] (HK and D of k_cache)");
  check_sizes(op, "v", v, {ks[0], vc[heads_at], ks[2], vc[v_cache.dim() - 1]},
              "[B, HV, S, DV] (B and S of k, HV and DV of v_cache)");
  TENFOLD_CHECK_VALUE(layout != CacheLayout::contiguous || ks[0] == kc[0], "tenfold::", op,
                      ": k and k_cache [B, HK, L, D] must agree in B, got k ", shape_str(k),
                      " and k_cache ", shape_str(k_cache));
}

void check_angles(const char* op, const Tensor& k, const DhaAppendArgs& a) {
  TENFOLD_CHECK_VALUE(a.cos.has_value() == a.sin.has_value(), "tenfold::", op,
                      ": cos and sin must be given together");
  if (!a.cos) return;
  const std::pair<const char*, const Tensor*> tensors[] = {{"cos", &*a.cos}, {"sin", &*a.sin}};
  for (const auto& [name, t] : tensors) {
    check_float_dtype(op, name, *t);
    check_same_device(op, "k", k, name, *t);
    check_dim(op, name, *t, 3, "[B or 1, S, D]");
    const int64_t batch = t->sizes()[0] == 1 ? 1 : k.sizes()[0];
    check_sizes(op, name, *t, {batch, k.sizes()[2], k.sizes()[3]}, "[B or 1, S, D]");
  }
  check_same_dtype(op, "cos", *a.cos, "sin", *a.sin);
  TENFOLD_CHECK_VALUE(k.sizes()[3] % 2 == 0, "tenfold::", op,
                      ": rotation (cos, sin) needs an even head dim D, got k ", shape_str(k));
}

void check_written(const char* op, const char* arg, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  TENFOLD_CHECK_VALUE(t.numel() == 0 || t.sizes()[last] == 1 || t.strides()[last] == 1,
                      "tenfold::", op, ": the last dimension of ", arg,
                      " must be contiguous to be written in place, got stride ", t.strides()[last]);
  check_no_overlap(op, arg, t);
}

}  // namespace

DhaAppendParams check_dha_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                                 const Tensor& v, const Tensor& slots, const DhaAppendArgs& a) {
  constexpr auto op = "dha_cache_append_";
  const CacheLayout layout = a.paged              ? CacheLayout::paged
                             : k_cache.dim() == 3 ? CacheLayout::ragged
                                                  : CacheLayout::contiguous;
  check_caches(op, k_cache, v_cache, layout);
  check_new_tokens(op, k_cache, v_cache, k, v, layout);
  check_int_dtype(op, "slots", slots);
  check_same_device(op, "k_cache", k_cache, "slots", slots);
  check_sizes(op, "slots", slots, {k.sizes()[0], k.sizes()[2]}, "[B, S]");
  check_angles(op, k, a);
  check_written(op, "k_cache", k_cache);
  check_written(op, "v_cache", v_cache);
  TENFOLD_CHECK_VALUE(k_cache.numel() == 0 || k_cache.data_ptr() != v_cache.data_ptr(),
                      "tenfold::", op, ": k_cache and v_cache must not share memory");
  const auto kc = k_cache.sizes(), ks = k.strides(), vs = v.strides();
  DhaAppendParams p{};
  p.layout = layout;
  p.k_cache = cache_strides(k_cache, layout), p.v_cache = cache_strides(v_cache, layout);
  p.k_batch = ks[0], p.k_head = ks[1], p.k_token = ks[2];
  p.v_batch = vs[0], p.v_head = vs[1], p.v_token = vs[2];
  p.slot_batch = slots.strides()[0], p.slot_token = slots.strides()[1];
  p.batch = k.sizes()[0], p.k_heads = k.sizes()[1], p.v_heads = v.sizes()[1];
  p.num_tokens = k.sizes()[2], p.head_dim = k.sizes()[3], p.value_dim = v.sizes()[3];
  p.num_slots = layout == CacheLayout::paged    ? kc[0] * kc[1]
                : layout == CacheLayout::ragged ? kc[0]
                                                : kc[2];
  p.block_size = a.paged ? kc[1] : 0;
  p.rotate = a.cos.has_value();
  p.dtype = p.angle_dtype = to_dtype(k.scalar_type());
  if (p.rotate) {
    p.angle_dtype = to_dtype(a.cos->scalar_type());
    p.cos_batch = a.cos->sizes()[0] == 1 ? 0 : a.cos->strides()[0];
    p.sin_batch = a.sin->sizes()[0] == 1 ? 0 : a.sin->strides()[0];
    p.cos_token = a.cos->strides()[1], p.sin_token = a.sin->strides()[1];
  }
  return p;
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "dha_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kmap, Tensor vmap, "
      "Tensor kv_lens, *, Tensor? block_table=None, int block_size=0, float? scale=None, "
      "int window_left=-1, int num_splits=0, Tensor? kv_start=None, Tensor? offsets=None, "
      "float softcap=0.0) -> (Tensor out, Tensor lse)");
  m.def(
      "dha_cache_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor slots, *, bool paged=False, Tensor? cos=None, Tensor? sin=None) -> ()");
}
