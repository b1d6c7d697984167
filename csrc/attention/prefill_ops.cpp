// SPDX-License-Identifier: Apache-2.0
// Schemas of dha_attention and its backward (the only ones), and their argument checks.
#include "attention/prefill_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "attention/head_maps.h"

namespace tenfold {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxLength = int64_t{1} << 30;

void check_dense(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_dim(op, "q", q, 4, "[B, H, Sq, D]");
  check_dim(op, "k", k, 4, "[B, HK, Sk, D]");
  check_dim(op, "v", v, 4, "[B, HV, Sk, DV]");
  const auto qs = q.sizes(), ks = k.sizes(), vs = v.sizes();
  TENFOLD_CHECK_VALUE(
      qs[0] == ks[0] && qs[0] == vs[0] && qs[3] == ks[3] && ks[2] == vs[2], "tenfold::", op,
      ": q [B, H, Sq, D], k [B, HK, Sk, D] and v [B, HV, Sk, DV] must agree in B, D "
      "and Sk, got q ",
      shape_str(q), ", k ", shape_str(k), " and v ", shape_str(v));
}

void check_cu_seqlens(const char* op, const char* arg, const Tensor& cu, const Tensor& q) {
  TENFOLD_CHECK_TYPE(cu.scalar_type() == ScalarType::Int, "tenfold::", op, ": ", arg,
                     " must be int32, got ", dtype_name(cu.scalar_type()));
  check_same_device(op, "q", q, arg, cu);
  check_dim(op, arg, cu, 1, "[B + 1]");
  TENFOLD_CHECK_VALUE(cu.sizes()[0] >= 1, "tenfold::", op, ": ", arg,
                      " must have B + 1 entries, got none");
}

void check_varlen(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                  const AttentionArgs& a) {
  TENFOLD_CHECK_VALUE(a.cu_seqlens_q && a.cu_seqlens_k, "tenfold::", op,
                      ": cu_seqlens_q and cu_seqlens_k must be given together");
  check_dim(op, "q", q, 3, "[Tq, H, D] (with cu_seqlens)");
  check_dim(op, "k", k, 3, "[Tk, HK, D] (with cu_seqlens)");
  check_dim(op, "v", v, 3, "[Tk, HV, DV] (with cu_seqlens)");
  TENFOLD_CHECK_VALUE(
      q.sizes()[2] == k.sizes()[2] && k.sizes()[0] == v.sizes()[0], "tenfold::", op,
      ": q [Tq, H, D], k [Tk, HK, D] and v [Tk, HV, DV] must agree in D and Tk, got "
      "q ",
      shape_str(q), ", k ", shape_str(k), " and v ", shape_str(v));
  check_cu_seqlens(op, "cu_seqlens_q", *a.cu_seqlens_q, q);
  check_cu_seqlens(op, "cu_seqlens_k", *a.cu_seqlens_k, q);
  TENFOLD_CHECK_VALUE(a.cu_seqlens_q->sizes()[0] == a.cu_seqlens_k->sizes()[0], "tenfold::", op,
                      ": cu_seqlens_q and cu_seqlens_k must have the same length B + 1, got ",
                      shape_str(*a.cu_seqlens_q), " and ", shape_str(*a.cu_seqlens_k));
  TENFOLD_CHECK_VALUE(!a.attn_bias, "tenfold::", op,
                      ": attn_bias is for dense batches; it cannot be combined with cu_seqlens");
}

BiasKind bias_kind(const char* op, const Tensor& bias) {
  switch (bias.scalar_type()) {
    case ScalarType::Bool: return BiasKind::boolean;
    case ScalarType::Float: return BiasKind::f32;
    case ScalarType::BFloat16: return BiasKind::bf16;
    case ScalarType::Half: return BiasKind::f16;
    default:
      raise(ErrorKind::type, "tenfold::", op,
            ": attn_bias must be bool (True: the key is seen), float32, bfloat16 or float16, got ",
            dtype_name(bias.scalar_type()));
  }
}

void check_bias(const char* op, const Tensor& q, const Tensor& k, const Tensor& bias) {
  bias_kind(op, bias);
  check_same_device(op, "q", q, "attn_bias", bias);
  const int64_t want[] = {q.sizes()[0], q.sizes()[1], q.sizes()[2], k.sizes()[2]};
  bool fits = bias.dim() <= 4;
  for (int64_t i = 0; fits && i < bias.dim(); ++i) {
    const int64_t size = bias.sizes()[i];
    fits = size == 1 || size == want[4 - bias.dim() + i];
  }
  TENFOLD_CHECK_VALUE(fits, "tenfold::", op, ": attn_bias must broadcast to [B, H, Sq, Sk] of q ",
                      shape_str(q), " and k ", shape_str(k), ", got ", shape_str(bias));
}

AttentionBias bias_params(const char* op, const Tensor& bias) {
  AttentionBias b{bias.data_ptr(), bias_kind(op, bias), 0, 0, 0, 0};
  int64_t* strides[] = {&b.batch, &b.head, &b.row, &b.key};
  for (int64_t i = 0; i < bias.dim(); ++i)
    *strides[4 - bias.dim() + i] = bias.sizes()[i] == 1 ? 0 : bias.strides()[i];
  return b;
}

}  // namespace

void check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& kmap, const Tensor& vmap, const AttentionArgs& a) {
  check_float_dtype(op, "q", q);
  check_same_device(op, "q", q, "k", k);
  check_same_device(op, "q", q, "v", v);
  check_same_dtype(op, "q", q, "k", k);
  check_same_dtype(op, "q", q, "v", v);
  const bool varlen = a.cu_seqlens_q || a.cu_seqlens_k;
  if (varlen) {
    check_varlen(op, q, k, v, a);
  } else {
    check_dense(op, q, k, v);
  }
  const int64_t d = q.sizes()[q.dim() - 1], dv = v.sizes()[v.dim() - 1];
  TENFOLD_CHECK_VALUE(d >= 1 && d <= kMaxHeadDim && dv >= 1 && dv <= kMaxHeadDim, "tenfold::", op,
                      ": head dims D and DV must be in [1, ", kMaxHeadDim, "], got q ",
                      shape_str(q), " and v ", shape_str(v));
  for (const Tensor* t : {&q, &k})
    for (int64_t i = 0; i < t->dim(); ++i)
      TENFOLD_CHECK_VALUE(t->sizes()[i] <= kMaxLength, "tenfold::", op, ": sizes up to ",
                          kMaxLength, " are supported, got ", shape_str(*t));
  check_head_map(op, "kmap", kmap, q);
  check_head_map(op, "vmap", vmap, q);
  check_logit_options(op, a.scale, a.softcap, a.window_left);
  TENFOLD_CHECK_VALUE(a.window_right >= -1, "tenfold::", op,
                      ": window_right must be -1 (none) or a number of keys >= 0, got ",
                      a.window_right);
  TENFOLD_CHECK_VALUE(a.max_q >= 0 && a.max_k >= 0, "tenfold::", op,
                      ": max_q and max_k must be >= 0, got ", a.max_q, " and ", a.max_k);
  if (a.attn_bias) check_bias(op, q, k, *a.attn_bias);
}

void check_attention_backward(const char* op, const Tensor& dout, const Tensor& q, const Tensor& v,
                              const Tensor& out, const Tensor& lse, const OptTensor& dlse,
                              bool varlen) {
  const auto qs = q.sizes();
  const int64_t dv = v.sizes()[v.dim() - 1];
  for (const auto& [name, t] : {std::pair{"dout", &dout}, std::pair{"out", &out}}) {
    check_same_device(op, "q", q, name, *t);
    check_same_dtype(op, "q", q, name, *t);
    if (varlen) {
      check_sizes(op, name, *t, {qs[0], qs[1], dv}, "[Tq, H, DV]");
    } else {
      check_sizes(op, name, *t, {qs[0], qs[1], qs[2], dv}, "[B, H, Sq, DV]");
    }
  }
  for (const auto& [name, t] :
       {std::pair{"lse", &lse}, std::pair{"dlse", dlse ? &*dlse : nullptr}}) {
    if (!t) continue;
    check_same_device(op, "q", q, name, *t);
    TENFOLD_CHECK_TYPE(t->scalar_type() == ScalarType::Float, "tenfold::", op, ": ", name,
                       " must be float32, got ", dtype_name(t->scalar_type()));
    if (varlen) {
      check_sizes(op, name, *t, {qs[1], qs[0]}, "[H, Tq]");
    } else {
      check_sizes(op, name, *t, {qs[0], qs[1], qs[2]}, "[B, H, Sq]");
    }
  }
}

RowLayout row_layout(const Tensor& t) {
  const auto s = t.strides();
  return t.dim() == 4 ? RowLayout{s[0], s[1], s[2]} : RowLayout{0, s[1], s[0]};
}

AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const AttentionArgs& a) {
  const bool varlen = a.cu_seqlens_q.has_value();
  AttentionParams p{};
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.q_at = row_layout(q), p.k_at = row_layout(k), p.v_at = row_layout(v);
  p.batch = varlen ? a.cu_seqlens_q->sizes()[0] - 1 : q.sizes()[0];
  p.q_heads = q.sizes()[1], p.k_heads = k.sizes()[1], p.v_heads = v.sizes()[1];
  p.head_dim = q.sizes()[q.dim() - 1], p.value_dim = v.sizes()[v.dim() - 1];
  p.max_q = varlen ? a.max_q : q.sizes()[2];
  p.max_k = varlen ? a.max_k : k.sizes()[2];
  const int64_t rows = varlen ? q.sizes()[0] : q.sizes()[2];
  p.lse_head = rows, p.lse_batch = varlen ? 0 : p.q_heads * rows;
  p.mask.left = a.window_left < 0 ? kNoLimit : std::min(a.window_left, kNoLimit);
  p.mask.right = a.causal ? 0 : a.window_right < 0 ? kNoLimit : std::min(a.window_right, kNoLimit);
  if (a.attn_bias) p.bias = bias_params("dha_attention", *a.attn_bias);
  p.scale = static_cast<float>(a.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim))));
  p.softcap = static_cast<float>(a.softcap);
  p.dtype = q.scalar_type() == ScalarType::Float      ? Dtype::f32
            : q.scalar_type() == ScalarType::BFloat16 ? Dtype::bf16
                                                      : Dtype::f16;
  return p;
}

Tensor new_like_rows(const Tensor& like, int64_t dim) {
  const auto s = like.sizes();
  if (like.dim() == 3) return new_output(like, {s[0], s[1], dim}, like.scalar_type());
  if (s[1] > 1 && s[2] > 1 && like.strides()[2] > like.strides()[1])
    return torch::stable::transpose(new_output(like, {s[0], s[2], s[1], dim}, like.scalar_type()),
                                    1, 2);
  return new_output(like, {s[0], s[1], s[2], dim}, like.scalar_type());
}

Tensor new_lse(const Tensor& q) {
  const auto s = q.sizes();
  return q.dim() == 4 ? new_output(q, {s[0], s[1], s[2]}, ScalarType::Float)
                      : new_output(q, {s[1], s[0]}, ScalarType::Float);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "dha_attention(Tensor q, Tensor k, Tensor v, Tensor kmap, Tensor vmap, *, "
      "float? scale=None, bool causal=True, int window_left=-1, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, int max_q=0, int max_k=0, Tensor? attn_bias=None, "
      "float softcap=0.0, int window_right=-1) -> (Tensor out, Tensor lse)");
  m.def(
      "dha_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor kmap, Tensor vmap, *, float? scale=None, bool causal=True, int window_left=-1, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, int max_q=0, int max_k=0, "
      "Tensor? attn_bias=None, float softcap=0.0, int window_right=-1, Tensor? dlse=None, "
      "bool deterministic=True) -> (Tensor dq, Tensor dk, Tensor dv)");
}
