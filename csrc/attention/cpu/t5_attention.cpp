// SPDX-License-Identifier: Apache-2.0
// CPU registration of t5_attention and its backward: the bias by distance, then the kernels of
// dha_attention.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <vector>

#include "attention/cpu/attention_host.h"
#include "attention/cpu/dha_attention_backward.h"
#include "attention/cpu/t5_bias.h"
#include "attention/cpu/t5_decode.h"

namespace tenfold::cpu {
namespace {

using Along = DistanceTable::Along;

// Index arrays that the parameters point to.
struct Indices {
  std::vector<int32_t> heads, kv_len;
};

Indices make_indices(const char* op, const Tensor& k, const OptTensor& kv_len, AttentionParams* p) {
  Indices at;
  at.heads.resize(p->q_heads);
  std::iota(at.heads.begin(), at.heads.end(), 0);
  p->kmap = p->vmap = at.heads.data();
  if (!kv_len) return at;
  for (const int64_t n : read_ints<int64_t>(*kv_len)) {
    TENFOLD_CHECK_VALUE(n >= 0 && n <= k.sizes()[2], "tenfold::", op, ": kv_len[", at.kv_len.size(),
                        "] must be in [0, Lk = ", k.sizes()[2], "], got ", n);
    at.kv_len.push_back(static_cast<int32_t>(n));
  }
  p->kv_len = at.kv_len.data();
  return at;
}

std::tuple<Tensor, Tensor> t5_attention_op(Tensor q, Tensor k, Tensor v, OptTensor bias_table,
                                           OptTensor kv_len, bool bidirectional, bool causal,
                                           int64_t max_distance, int64_t q_offset, double dropout_p,
                                           int64_t seed, int64_t offset, double scale) {
  constexpr auto op = "t5_attention";
  const T5Args a{bidirectional, causal, max_distance, q_offset, dropout_p, seed, offset, scale};
  check_t5_attention(op, q, k, v, bias_table, kv_len, a);
  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
               v_rows = with_contiguous_rows(v);
  AttentionForward p{};
  static_cast<AttentionParams&>(p) = t5_params(q_rows, k_rows, v_rows, a);
  const Indices indices = make_indices(op, k, kv_len, &p);
  const Tensor out = new_like_rows(q, p.value_dim), lse = new_lse(q);
  p.out = out.data_ptr(), p.out_at = row_layout(out), p.lse = data_as<float>(lse);
  const bool decode = p.max_q == 1 && p.dropout.below == 0;
  std::optional<DistanceTable> bias;
  if (bias_table) {
    bias.emplace(*bias_table, a, p.max_q, p.max_k, decode ? Along::keys : Along::queries);
    p.relative = bias->params();
  }
  if (decode) {
    run_t5_decode(p);
  } else {
    run_attention(p);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> t5_attention_backward_op(
    Tensor dout, Tensor q, Tensor k, Tensor v, OptTensor bias_table, OptTensor kv_len, Tensor out,
    Tensor lse, bool bidirectional, bool causal, int64_t max_distance, int64_t q_offset,
    double dropout_p, int64_t seed, int64_t offset, double scale, OptTensor dlse) {
  constexpr auto op = "t5_attention_backward";
  const T5Args a{bidirectional, causal, max_distance, q_offset, dropout_p, seed, offset, scale};
  check_t5_attention(op, q, k, v, bias_table, kv_len, a);
  check_attention_backward(op, dout, q, v, out, lse, dlse, false);
  const Tensor rows[] = {with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v),
                         with_contiguous_rows(out), with_contiguous_rows(dout)};
  const Tensor lse_rows = torch::stable::contiguous(lse);
  const Tensor dlse_rows = dlse ? torch::stable::contiguous(*dlse) : Tensor();
  AttentionBackward p{};
  static_cast<AttentionParams&>(p) = t5_params(rows[0], rows[1], rows[2], a);
  const Indices indices = make_indices(op, k, kv_len, &p);
  const Tensor dq = new_like_rows(q, p.head_dim), dk = new_like_rows(k, p.head_dim);
  const Tensor dv = new_like_rows(v, p.value_dim), dtable = new_t5_table(q, bias_table);
  set_gradients(rows[3], rows[4], dq, dk, dv, &p);
  p.by_tiles = true;
  p.lse = data_as<float>(lse_rows), p.dlse = dlse ? data_as<float>(dlse_rows) : nullptr;
  const Isa isa = active_isa();
  if (!bias_table) {
    run_attention_backward(isa, p, dk, dv, nullptr);
    return {dq, dk, dv, dtable};
  }
  const int64_t step = attention_backward_bias_step(isa, p);
  const DistanceTable bias(*bias_table, a, p.max_q, p.max_k,
                           step > 0 ? Along::queries : Along::keys);
  p.relative = bias.params();
  std::vector<float> distances(bias.floats());
  run_attention_backward(isa, p, dk, dv, distances.data());
  bias.sum_buckets(distances.data(), data_as<float>(dtable));
  return {dq, dk, dv, torch::stable::to(dtable, bias_table->scalar_type())};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("t5_attention", TORCH_BOX(&tenfold::cpu::t5_attention_op));
  m.impl("t5_attention_backward", TORCH_BOX(&tenfold::cpu::t5_attention_backward_op));
}
