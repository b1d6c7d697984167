// SPDX-License-Identifier: Apache-2.0
// C entry points of t5_attention's emulated kernels, for ctypes. The launch code is the kernels'
// own.
#define TENFOLD_CUDA_EMU
#include "attention/cuda/dha_attention_backward_kernel.cuh"
#include "attention/cuda/dha_attention_kernel.cuh"
#include "attention/cuda/t5_bias_kernel.cuh"
#include "entry.h"  // after the kernels

namespace {

// What Python hands over, in the order of `_Problem` in emulated_attention_t5.py.
struct Problem {
  int64_t dtype, batch, heads, head_dim, value_dim, queries, keys;
  int64_t bidirectional, causal, max_distance, q_offset;
  int64_t table_dtype, buckets, lens_wide, below, seed, offset;
  int64_t q_at[3], k_at[3], v_at[3], out_at[3], dout_at[3], dq_at[3], dk_at[3], dv_at[3];
  const void *q, *k, *v, *table, *kv_len, *head_map;
  void* out;
  float* lse;
  const void* dout;
  const float* dlse;
  void *dq, *dk, *dv;
  float *delta, *dtable;
  double scale, keep_scale;
};

RowLayout layout(const int64_t (&at)[3]) {
  return {at[0], at[1], at[2]};
}

RelativeBuckets buckets(const Problem& n) {
  return relative_buckets(n.buckets, n.bidirectional != 0, n.max_distance);
}

template <class Params>
void fill(OnDevice<Params>& p, const Problem& n, const Room& room) {
  p.q = n.q, p.k = n.k, p.v = n.v;
  p.q_at = layout(n.q_at), p.k_at = layout(n.k_at), p.v_at = layout(n.v_at);
  p.batch = n.batch, p.q_heads = p.k_heads = p.v_heads = n.heads;
  p.head_dim = n.head_dim, p.value_dim = n.value_dim;
  p.max_q = n.queries, p.max_k = n.keys;
  p.lse_head = n.queries, p.lse_batch = n.heads * n.queries;
  p.mask = {kNoLimit, n.causal ? 0 : kNoLimit, n.q_offset};
  p.scale = static_cast<float>(n.scale);
  p.dtype = static_cast<Dtype>(n.dtype);
  const auto seed = static_cast<uint64_t>(n.seed);
  p.dropout = {static_cast<uint32_t>(n.below),
               static_cast<float>(n.keep_scale),
               {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
               static_cast<uint32_t>(n.offset)};
  p.q_to_k = p.q_to_v = {n.head_map, false, 1};
  p.queries = {{}, n.queries}, p.keys = {{}, n.keys};
  p.kv_len = ints(n.kv_len, n.lens_wide);
  const int64_t size = dtype_size(p.dtype);
  p.q_vectors = row_vectors(p.q, p.q_at, p.head_dim, size);
  p.k_vectors = row_vectors(p.k, p.k_at, p.head_dim, size);
  p.v_vectors = row_vectors(p.v, p.v_at, p.value_dim, size);
  p.out_at = layout(n.out_at);
  if (n.table == nullptr) return;
  const BiasKind kinds[] = {BiasKind::f32, BiasKind::bf16, BiasKind::f16};
  AttentionBias table{};
  table.data = n.table, table.kind = kinds[n.table_dtype], table.row = n.heads, table.head = 1;
  const T5Bias bias{buckets(n), table, n.heads};
  auto* const lut = static_cast<float*>(room(t5_lut_floats(bias) * 4));
  launch_t5_lut(bias, lut, nullptr);
  p.relative_lut = lut, p.reach = bucket_reach(bias.buckets);
}

}  // namespace

API void emu_t5_attention(const Problem* n) {
  Memory memory;
  ForwardArgs p{};
  fill(p, *n, memory.room());
  p.out = n->out, p.lse = n->lse;
  p.out_vectors = row_vectors(n->out, p.out_at, p.value_dim, dtype_size(p.dtype));
  with_dtype(n->dtype, [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim,
                      [&]<int kW>() { launch_dha_attention<T, kW, true>(p, nullptr); });
  });
}

API void emu_t5_attention_backward(const Problem* n) {
  Memory memory;
  const Room room = memory.room();
  BackwardArgs p{};
  fill(p, *n, room);
  const int64_t size = dtype_size(p.dtype);
  p.out = n->out, p.dout = n->dout, p.lse = n->lse, p.dlse = n->dlse, p.delta = n->delta;
  p.dq = n->dq, p.dk = n->dk, p.dv = n->dv;
  p.dout_at = layout(n->dout_at), p.dq_at = layout(n->dq_at);
  p.dk_at = layout(n->dk_at), p.dv_at = layout(n->dv_at);
  p.dout_vectors = row_vectors(p.dout, p.dout_at, p.value_dim, size);
  p.dq_vectors = row_vectors(p.dq, p.dq_at, p.head_dim, size);
  p.dk_vectors = row_vectors(p.dk, p.dk_at, p.head_dim, size);
  p.dv_vectors = row_vectors(p.dv, p.dv_at, p.value_dim, size);
  with_dtype(n->dtype, [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim, [&]<int kW>() {
      T5Sums sums{};
      if (n->table != nullptr) {
        sums.buckets = buckets(*n), sums.heads = n->heads, sums.dtable = n->dtable;
        sums.of_head = sums_of_head<T, kW>(p), sums.pitch = sums_pitch<T, kW>(p.reach);
        p.sums_pitch = static_cast<int>(sums.pitch);
        p.sums = static_cast<float*>(room(sums.heads * sums.of_head * sums.pitch * 4));
        sums.sums = p.sums;
      }
      launch_dha_backward<T, kW, Grad::q, true>(p, nullptr);
      launch_dha_backward<T, kW, Grad::k, true>(p, nullptr);
      launch_dha_backward<T, kW, Grad::v, true>(p, nullptr);
      if (n->table != nullptr) launch_t5_table(sums, nullptr);
    });
  });
}
