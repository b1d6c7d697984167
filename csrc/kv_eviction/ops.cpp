// SPDX-License-Identifier: Apache-2.0
// Schemas of the kv_eviction family (the only ones) and the argument checks shared by both
// backends.
#include "kv_eviction/ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace tenfold {
namespace {

constexpr int64_t kMaxLength = int64_t{1} << 30;  // slots are int32 in the kernels

void check_batch_ints(const char* op, const char* arg, const OptTensor& t, int64_t batch,
                      const char* like_name, const Tensor& like) {
  if (!t) return;
  check_int_dtype(op, arg, *t);
  check_same_device(op, like_name, like, arg, *t);
  check_sizes(op, arg, *t, {batch}, "[B]");
}

void check_length(const char* op, const char* arg, int64_t length) {
  TENFOLD_CHECK_VALUE(length <= kMaxLength, "tenfold::", op, ": ", arg, " has ", length,
                      " slots, at most ", kMaxLength, " are supported");
}

void check_proxy_shapes(const char* op, const Tensor& q, const Tensor& k, bool has_kmap) {
  check_float_dtype(op, "q", q);
  check_same_device(op, "q", q, "k", k);
  check_same_dtype(op, "q", q, "k", k);
  check_dim(op, "q", q, 4, "[B, Hq, W, D]");
  check_dim(op, "k", k, 4, "[B, Hkv, L, D]");
  TENFOLD_CHECK_VALUE(q.sizes()[0] == k.sizes()[0] && q.sizes()[3] == k.sizes()[3], "tenfold::", op,
                      ": q [B, Hq, W, D] and k [B, Hkv, L, D] must agree in B and D, got q ",
                      shape_str(q), " and k ", shape_str(k));
  TENFOLD_CHECK_VALUE(q.sizes()[3] > 0, "tenfold::", op, ": head dim D must be positive, got q ",
                      shape_str(q));
  const int64_t hq = q.sizes()[1], hkv = k.sizes()[1];
  TENFOLD_CHECK_VALUE(has_kmap || (hkv == 0 ? hq == 0 : hq % hkv == 0), "tenfold::", op,
                      ": Hq must be a multiple of Hkv (or pass kmap), got q ", shape_str(q),
                      " and k ", shape_str(k));
  check_length(op, "k", k.sizes()[2]);
  check_length(op, "q", q.sizes()[2]);
}

}  // namespace

ScoreReduce check_proxy_scores(const char* op, const Tensor& q, const Tensor& k,
                               const ProxyScoresArgs& a) {
  check_proxy_shapes(op, q, k, a.kmap.has_value());
  const int64_t b = q.sizes()[0], hq = q.sizes()[1], w = q.sizes()[2];
  if (a.lse) {
    TENFOLD_CHECK_TYPE(a.lse->scalar_type() == ScalarType::Float, "tenfold::", op,
                       ": lse must be float32, got ", dtype_name(a.lse->scalar_type()));
    check_same_device(op, "q", q, "lse", *a.lse);
    check_sizes(op, "lse", *a.lse, {b, hq, w}, "[B, Hq, W]");
  }
  TENFOLD_CHECK_VALUE(std::isfinite(a.scale), "tenfold::", op, ": scale must be finite, got ",
                      a.scale);
  TENFOLD_CHECK_VALUE(a.q_offset >= -1 && a.q_offset <= kMaxLength, "tenfold::", op,
                      ": q_offset must be -1 (the last W slots) or a slot >= 0, got ", a.q_offset);
  if (a.q_positions) {
    check_int_dtype(op, "q_positions", *a.q_positions);
    check_same_device(op, "q", q, "q_positions", *a.q_positions);
    if (a.q_positions->dim() == 2) {
      check_sizes(op, "q_positions", *a.q_positions, {b, w}, "[B, W]");
    } else {
      check_sizes(op, "q_positions", *a.q_positions, {w}, "[W] or [B, W]");
    }
  }
  check_batch_ints(op, "kv_start", a.kv_start, b, "q", q);
  check_batch_ints(op, "kv_lens", a.kv_lens, b, "q", q);
  TENFOLD_CHECK_VALUE(a.window >= -1, "tenfold::", op,
                      ": window must be -1 (none) or a number of keys >= 0, got ", a.window);
  if (a.kmap) {
    check_int_dtype(op, "kmap", *a.kmap);
    check_same_device(op, "q", q, "kmap", *a.kmap);
    check_sizes(op, "kmap", *a.kmap, {hq}, "[Hq]");
  }
  if (a.reduce == "mean") return ScoreReduce::mean;
  if (a.reduce == "sum") return ScoreReduce::sum;
  TENFOLD_CHECK_VALUE(a.reduce == "max", "tenfold::", op,
                      ": reduce must be 'mean', 'sum' or 'max', got '", a.reduce, "'");
  return ScoreReduce::max;
}

NaclSelectParams check_nacl_select(const char* op, const Tensor& scores, const NaclSelectArgs& a) {
  TENFOLD_CHECK_TYPE(scores.scalar_type() == ScalarType::Float, "tenfold::", op,
                     ": scores must be float32, got ", dtype_name(scores.scalar_type()));
  check_dim(op, "scores", scores, 3, "[B, H, L]");
  const int64_t b = scores.sizes()[0], h = scores.sizes()[1], length = scores.sizes()[2];
  check_length(op, "scores", length);
  const std::pair<const char*, int64_t> counts[] = {{"n_sink", a.n_sink},
                                                    {"n_recent", a.n_recent},
                                                    {"n_topk", a.n_topk},
                                                    {"n_random", a.n_random}};
  for (const auto& [name, n] : counts)
    TENFOLD_CHECK_VALUE(n >= 0 && n <= kMaxLength, "tenfold::", op, ": ", name,
                        " must be a count >= 0, got ", n);
  TENFOLD_CHECK_VALUE(a.width() <= length, "tenfold::", op,
                      ": n_sink + n_recent + n_topk + n_random must be <= L = ", length, ", got ",
                      a.n_sink, " + ", a.n_recent, " + ", a.n_topk, " + ", a.n_random, " = ",
                      a.width());
  TENFOLD_CHECK_VALUE(std::isfinite(a.tau) && static_cast<float>(a.tau) > 0.0f, "tenfold::", op,
                      ": tau must be a positive finite number, got ", a.tau);
  TENFOLD_CHECK_VALUE(a.logits == "score" || a.logits == "log_score", "tenfold::", op,
                      ": logits must be 'score' or 'log_score', got '", a.logits, "'");
  TENFOLD_CHECK_VALUE(a.pool_kernel >= 1 && a.pool_kernel % 2 == 1 && a.pool_kernel <= kMaxLength,
                      "tenfold::", op, ": pool_kernel must be an odd number >= 1, got ",
                      a.pool_kernel);
  TENFOLD_CHECK_VALUE(a.pool == "max" || a.pool == "avg", "tenfold::", op,
                      ": pool must be 'max' or 'avg', got '", a.pool, "'");
  TENFOLD_CHECK_VALUE(a.layer >= 0 && a.layer <= 0xFFFFFFFFll, "tenfold::", op,
                      ": layer must be in [0, 2^32), got ", a.layer);
  check_batch_ints(op, "kv_start", a.kv_start, b, "scores", scores);
  check_batch_ints(op, "kv_lens", a.kv_lens, b, "scores", scores);
  check_batch_ints(op, "row_id", a.row_id, b, "scores", scores);
  const bool per_head = a.counts && a.counts->dim() == 3;
  if (a.counts) {
    check_int_dtype(op, "counts", *a.counts);
    check_same_device(op, "scores", scores, "counts", *a.counts);
    if (per_head) {
      check_sizes(op, "counts", *a.counts, {b, h, 4}, "[B, H, 4]");
    } else {
      check_sizes(op, "counts", *a.counts, {b, 4}, "[B, 4] or [B, H, 4]");
    }
  }
  const auto seed = static_cast<uint64_t>(a.seed);
  return {.batch = b,
          .heads = h,
          .length = length,
          .width = a.width(),
          .counts = {static_cast<int32_t>(a.n_sink), static_cast<int32_t>(a.n_recent),
                     static_cast<int32_t>(a.n_topk), static_cast<int32_t>(a.n_random)},
          .counts_per_head = per_head,
          .tau = static_cast<float>(a.tau),
          .log_score = a.logits == "log_score",
          .seed_lo = static_cast<uint32_t>(seed),
          .seed_hi = static_cast<uint32_t>(seed >> 32),
          .layer = static_cast<uint32_t>(a.layer),
          .pool_kernel = static_cast<int32_t>(a.pool_kernel),
          .pool_max = a.pool == "max"};
}

void check_kv_gather(const char* op, const Tensor& k, const Tensor& v, const Tensor& idx,
                     const OptTensor& new_lens, const OptTensor& inv_freq,
                     const OptTensor& kv_start) {
  check_float_dtype(op, "k", k);
  check_same_device(op, "k", k, "v", v);
  check_same_dtype(op, "k", k, "v", v);
  check_dim(op, "k", k, 4, "[B, HK, L, D]");
  check_dim(op, "v", v, 4, "[B, HV, L, DV]");
  TENFOLD_CHECK_VALUE(k.sizes()[0] == v.sizes()[0] && k.sizes()[2] == v.sizes()[2], "tenfold::", op,
                      ": k [B, HK, L, D] and v [B, HV, L, DV] must agree in B and L, got k ",
                      shape_str(k), " and v ", shape_str(v));
  check_int_dtype(op, "idx", idx);
  check_same_device(op, "k", k, "idx", idx);
  check_dim(op, "idx", idx, 3, "[B, H, C]");
  const int64_t b = k.sizes()[0], hk = k.sizes()[1], hv = v.sizes()[1], hi = idx.sizes()[1];
  TENFOLD_CHECK_VALUE(idx.sizes()[0] == b && (hi == 1 || (hi == hk && hi == hv)), "tenfold::", op,
                      ": idx must be [B, H, C] with H = HK = HV, or H = 1 shared by all heads; got "
                      "idx ",
                      shape_str(idx), " for k ", shape_str(k), " and v ", shape_str(v));
  check_length(op, "k", k.sizes()[2]);
  check_length(op, "idx", idx.sizes()[2]);
  if (new_lens) {
    check_int_dtype(op, "new_lens", *new_lens);
    check_same_device(op, "k", k, "new_lens", *new_lens);
    if (new_lens->dim() == 2) {
      check_sizes(op, "new_lens", *new_lens, {b, hi}, "[B, H of idx]");
    } else {
      check_sizes(op, "new_lens", *new_lens, {b}, "[B] or [B, H of idx]");
    }
  }
  if (inv_freq) {
    TENFOLD_CHECK_TYPE(inv_freq->scalar_type() == ScalarType::Float, "tenfold::", op,
                       ": inv_freq must be float32, got ", dtype_name(inv_freq->scalar_type()));
    check_same_device(op, "k", k, "inv_freq", *inv_freq);
    TENFOLD_CHECK_VALUE(k.sizes()[3] % 2 == 0, "tenfold::", op,
                        ": re-rotation (inv_freq) needs an even head dim D, got k ", shape_str(k));
    check_sizes(op, "inv_freq", *inv_freq, {k.sizes()[3] / 2}, "[D / 2]");
  }
  check_batch_ints(op, "kv_start", kv_start, b, "k", k);
}

void check_row_contiguous(const char* op, const char* arg, const Tensor& t) {
  TENFOLD_CHECK_VALUE(t.numel() == 0 || t.sizes()[3] == 1 || t.strides()[3] == 1, "tenfold::", op,
                      ": the last dimension of ", arg,
                      " must be contiguous to be written in place, got stride ", t.strides()[3]);
}

void check_in_place(const char* op, const Tensor& k, const Tensor& v, const Tensor& idx) {
  check_row_contiguous(op, "k", k);
  check_row_contiguous(op, "v", v);
  check_no_overlap(op, "k", k);
  check_no_overlap(op, "v", v);
  TENFOLD_CHECK_VALUE(k.numel() == 0 || k.data_ptr() != v.data_ptr(), "tenfold::", op,
                      ": k and v must not share memory");
  TENFOLD_CHECK_VALUE(idx.sizes()[2] <= k.sizes()[2], "tenfold::", op, ": idx has ", idx.sizes()[2],
                      " slots, k only ", k.sizes()[2]);
}

void check_ragged_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                         double scale, const OptTensor& lens) {
  constexpr auto op = "ragged_decode";
  check_float_dtype(op, "q", q);
  check_same_device(op, "q", q, "k", k);
  check_same_device(op, "q", q, "v", v);
  check_same_dtype(op, "q", q, "k", k);
  check_same_dtype(op, "q", q, "v", v);
  TENFOLD_CHECK_VALUE(q.dim() == 3 || q.dim() == 4,
                      "tenfold::ragged_decode: q must be [B, Hq, D] or "
                      "[B, Hq, Sq, D], got shape ",
                      shape_str(q));
  check_dim(op, "k", k, 2, "[N, D]");
  check_dim(op, "v", v, 2, "[N, DV]");
  const int64_t b = q.sizes()[0], hq = q.sizes()[1], d = q.sizes()[q.dim() - 1];
  TENFOLD_CHECK_VALUE(k.sizes()[1] == d && d > 0,
                      "tenfold::ragged_decode: k must be [N, D] with D of "
                      "q, got q ",
                      shape_str(q), " and k ", shape_str(k));
  TENFOLD_CHECK_VALUE(v.sizes()[0] == k.sizes()[0] && v.sizes()[1] > 0,
                      "tenfold::ragged_decode: v "
                      "must be [N, DV] with N of k, got k ",
                      shape_str(k), " and v ", shape_str(v));
  if (q.dim() == 4)
    TENFOLD_CHECK_VALUE(q.sizes()[2] <= kMaxDecodeQueries,
                        "tenfold::ragged_decode: Sq must be <= ", kMaxDecodeQueries, ", got q ",
                        shape_str(q));
  check_int_dtype(op, "offsets", offsets);
  check_same_device(op, "q", q, "offsets", offsets);
  check_dim(op, "offsets", offsets, 1, "[B * Hkv + 1]");
  const int64_t segments = offsets.sizes()[0] - 1;
  const bool divides = b == 0 ? segments == 0 : segments >= 0 && segments % b == 0;
  const int64_t hkv = b == 0 || !divides ? 0 : segments / b;
  TENFOLD_CHECK_VALUE(divides && (hkv == 0 ? b * hq == 0 : hq % hkv == 0),
                      "tenfold::ragged_decode: "
                      "offsets must have B * Hkv + 1 entries with Hq a multiple of Hkv, got ",
                      offsets.sizes()[0], " entries for q ", shape_str(q));
  TENFOLD_CHECK_VALUE(std::isfinite(scale), "tenfold::ragged_decode: scale must be finite, got ",
                      scale);
  if (lens) {
    check_int_dtype(op, "lens", *lens);
    check_same_device(op, "q", q, "lens", *lens);
    check_sizes(op, "lens", *lens, {segments}, "[B * Hkv]");
  }
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "proxy_scores(Tensor q, Tensor k, Tensor? lse=None, *, float scale, bool causal=True, "
      "int q_offset=-1, Tensor? q_positions=None, Tensor? kv_start=None, Tensor? kv_lens=None, "
      "int window=-1, str reduce=\"mean\", Tensor? kmap=None) -> (Tensor scores, Tensor lse)");
  m.def(
      "nacl_select(Tensor scores, int n_sink, int n_recent, int n_topk, int n_random, *, "
      "float tau=1.0, str logits=\"score\", int seed=0, int layer=0, Tensor? kv_start=None, "
      "Tensor? kv_lens=None, Tensor? row_id=None, Tensor? counts=None, int pool_kernel=1, "
      "str pool=\"max\", bool check_nan=False) -> (Tensor idx, Tensor new_lens)");
  m.def(
      "kv_gather(Tensor k, Tensor v, Tensor idx, *, Tensor? new_lens=None, Tensor? inv_freq=None, "
      "Tensor? kv_start=None) -> (Tensor k, Tensor v)");
  m.def(
      "kv_compact_(Tensor(a!) k, Tensor(b!) v, Tensor idx, *, Tensor? new_lens=None, "
      "Tensor? inv_freq=None, Tensor? kv_start=None) -> ()");
  m.def(
      "nacl_evict(Tensor q, Tensor k, Tensor v, Tensor? lse=None, *, float scale, bool "
      "causal=True, "
      "int q_offset=-1, Tensor? q_positions=None, Tensor? kv_start=None, Tensor? kv_lens=None, "
      "int window=-1, str reduce=\"mean\", Tensor? kmap=None, int n_sink, int n_recent, int "
      "n_topk, "
      "int n_random, float tau=1.0, str logits=\"score\", int seed=0, int layer=0, "
      "Tensor? row_id=None, Tensor? counts=None, int pool_kernel=1, str pool=\"max\", "
      "Tensor? inv_freq=None) -> (Tensor k, Tensor v, Tensor idx, Tensor new_lens)");
  m.def(
      "ragged_decode(Tensor q, Tensor k, Tensor v, Tensor offsets, *, float scale, "
      "Tensor? lens=None) -> (Tensor out, Tensor lse)");
}
