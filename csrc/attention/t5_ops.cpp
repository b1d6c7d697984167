// SPDX-License-Identifier: Apache-2.0
// Schemas of t5_attention and its backward (the only ones), and their argument checks.
#include "attention/t5_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "core/dispatch.h"

namespace tenfold {
namespace {

constexpr int64_t kMaxHeadDim = 256, kMaxLength = int64_t{1} << 30;

void check_tensors(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_float_dtype(op, "q", q);
  for (const auto& [name, t] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check_same_device(op, "q", q, name, *t);
    check_same_dtype(op, "q", q, name, *t);
  }
  check_dim(op, "q", q, 4, "[B, H, Lq, D]");
  check_dim(op, "k", k, 4, "[B, H, Lk, D]");
  check_dim(op, "v", v, 4, "[B, H, Lk, DV]");
  const auto qs = q.sizes(), ks = k.sizes(), vs = v.sizes();
  TENFOLD_CHECK_VALUE(qs[0] == ks[0] && qs[0] == vs[0] && qs[1] == ks[1] && qs[1] == vs[1] &&
                          qs[3] == ks[3] && ks[2] == vs[2],
                      "tenfold::", op,
                      ": q [B, H, Lq, D], k [B, H, Lk, D] and v [B, H, Lk, DV] must agree in B, H, "
                      "D and Lk, got q ",
                      shape_str(q), ", k ", shape_str(k), " and v ", shape_str(v));
  TENFOLD_CHECK_VALUE(qs[3] >= 1 && qs[3] <= kMaxHeadDim && vs[3] >= 1 && vs[3] <= kMaxHeadDim,
                      "tenfold::", op, ": head dims D and DV must be in [1, ", kMaxHeadDim,
                      "], got q ", shape_str(q), " and v ", shape_str(v));
  for (const Tensor* t : {&q, &k})
    for (int64_t i = 0; i < 4; ++i)
      TENFOLD_CHECK_VALUE(t->sizes()[i] <= kMaxLength, "tenfold::", op, ": sizes up to ",
                          kMaxLength, " are supported, got ", shape_str(*t));
}

void check_table(const char* op, const Tensor& q, const Tensor& table, const T5Args& a) {
  check_same_device(op, "q", q, "bias_table", table);
  TENFOLD_CHECK_TYPE(
      table.scalar_type() == ScalarType::Float || table.scalar_type() == q.scalar_type(),
      "tenfold::", op, ": bias_table must be float32 or of the dtype of q, ",
      dtype_name(q.scalar_type()), ", got ", dtype_name(table.scalar_type()));
  const int64_t heads = q.sizes()[1];
  TENFOLD_CHECK_VALUE(table.dim() == 2 && table.sizes()[1] == heads, "tenfold::", op,
                      ": bias_table must be [num_buckets, H = ", heads, "], got ",
                      shape_str(table));
  const int64_t count = table.sizes()[0], directions = a.bidirectional ? 2 : 1;
  TENFOLD_CHECK_VALUE(count % directions == 0 && count >= 2 * directions && count <= kMostBuckets,
                      "tenfold::", op, ": bias_table must have ",
                      a.bidirectional ? "an even number of buckets in [4, " : "2 to ", kMostBuckets,
                      a.bidirectional ? "] (bidirectional)" : " buckets", ", got ", count);
  const int64_t exact = count / directions / 2;
  TENFOLD_CHECK_VALUE(a.max_distance > exact && a.max_distance <= kMaxLength, "tenfold::", op,
                      ": max_distance must be in (", exact, ", ", kMaxLength, "], beyond the ",
                      exact, " buckets of one distance, got ", a.max_distance);
}

}  // namespace

void check_t5_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptTensor& bias_table, const OptTensor& kv_len, const T5Args& a) {
  check_tensors(op, q, k, v);
  TENFOLD_CHECK_VALUE(!(a.bidirectional && a.causal), "tenfold::", op,
                      ": bidirectional and causal exclude each other; a decoder has "
                      "bidirectional=False, causal=True");
  if (bias_table) check_table(op, q, *bias_table, a);
  if (kv_len) {
    check_int_dtype(op, "kv_len", *kv_len);
    check_same_device(op, "q", q, "kv_len", *kv_len);
    check_sizes(op, "kv_len", *kv_len, {q.sizes()[0]}, "[B]");
  }
  TENFOLD_CHECK_VALUE(std::abs(a.q_offset) <= kMaxLength, "tenfold::", op,
                      ": q_offset must be in [", -kMaxLength, ", ", kMaxLength, "], got ",
                      a.q_offset);
  TENFOLD_CHECK_VALUE(a.dropout_p >= 0.0 && a.dropout_p < 1.0, "tenfold::", op,
                      ": dropout_p must be in [0, 1), got ", a.dropout_p);
  TENFOLD_CHECK_VALUE(a.offset >= 0 && a.offset < int64_t{1} << 32, "tenfold::", op,
                      ": offset must be in [0, 2^32), got ", a.offset);
  TENFOLD_CHECK_VALUE(q.sizes()[0] * q.sizes()[1] < int64_t{1} << 32, "tenfold::", op,
                      ": B * H must be below 2^32, got ", shape_str(q));
  TENFOLD_CHECK_VALUE(std::isfinite(a.scale), "tenfold::", op, ": scale must be finite, got ",
                      a.scale);
}

AttentionParams t5_params(const Tensor& q, const Tensor& k, const Tensor& v, const T5Args& a) {
  AttentionParams p{};
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.q_at = row_layout(q), p.k_at = row_layout(k), p.v_at = row_layout(v);
  p.batch = q.sizes()[0], p.q_heads = p.k_heads = p.v_heads = q.sizes()[1];
  p.head_dim = q.sizes()[3], p.value_dim = v.sizes()[3];
  p.max_q = q.sizes()[2], p.max_k = k.sizes()[2];
  p.lse_head = p.max_q, p.lse_batch = p.q_heads * p.max_q;
  p.mask = {kNoLimit, a.causal ? 0 : kNoLimit, a.q_offset};
  p.scale = static_cast<float>(a.scale);
  p.dtype = to_dtype(q.scalar_type());
  if (a.dropout_p > 0.0) {
    const double below = std::min(std::nearbyint(a.dropout_p * 4294967296.0), 4294967295.0);
    const auto seed = static_cast<uint64_t>(a.seed);
    p.dropout = {static_cast<uint32_t>(below),
                 static_cast<float>(1.0 / (1.0 - a.dropout_p)),
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                 static_cast<uint32_t>(a.offset)};
  }
  return p;
}

Tensor new_t5_table(const Tensor& q, const OptTensor& bias_table) {
  return new_output(q, {bias_table ? bias_table->sizes()[0] : 0, q.sizes()[1]}, ScalarType::Float);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "t5_attention(Tensor q, Tensor k, Tensor v, Tensor? bias_table=None, Tensor? kv_len=None, *, "
      "bool bidirectional=True, bool causal=False, int max_distance=128, SymInt q_offset=0, "
      "float dropout_p=0.0, SymInt seed=0, SymInt offset=0, float scale=1.0) -> (Tensor out, "
      "Tensor "
      "lse)");
  m.def(
      "t5_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias_table, "
      "Tensor? kv_len, Tensor out, Tensor lse, *, bool bidirectional=True, bool causal=False, "
      "int max_distance=128, SymInt q_offset=0, float dropout_p=0.0, SymInt seed=0, SymInt "
      "offset=0, "
      "float scale=1.0, Tensor? dlse=None) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable)");
}
