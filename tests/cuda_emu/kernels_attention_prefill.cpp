// SPDX-License-Identifier: Apache-2.0
// C entry points of dha_attention's emulated kernels, for ctypes. The launch code is the kernels'
// own.
#define TENFOLD_CUDA_EMU
#include "attention/cuda/dha_attention_backward_kernel.cuh"
#include "attention/cuda/dha_attention_kernel.cuh"
#include "entry.h"  // after the kernels

namespace {

// What Python hands over, in the order of `_Problem` in emulated_attention_prefill.py.
struct Problem {
  int64_t dtype, batch, q_heads, k_heads, v_heads, head_dim, value_dim, queries, keys, packed;
  int64_t maps_wide, left, right;
  int64_t bias_kind, bias_stride[4];
  int64_t q_at[3], k_at[3], v_at[3], out_at[3], dout_at[3], dq_at[3], dk_at[3], dv_at[3];
  const void *kmap, *vmap, *cu_q, *cu_k, *bias;
  const void *q, *k, *v, *out, *dout;
  const float *lse, *dlse;
  void *dq, *dk, *dv;
  float* delta;
  double scale, softcap;
};

RowLayout layout(const int64_t (&at)[3]) {
  return {at[0], at[1], at[2]};
}

template <class Params>
void fill(OnDevice<Params>& p, const Problem& n) {
  p.q = n.q, p.k = n.k, p.v = n.v;
  p.q_at = layout(n.q_at), p.k_at = layout(n.k_at), p.v_at = layout(n.v_at);
  p.batch = n.batch, p.q_heads = n.q_heads, p.k_heads = n.k_heads, p.v_heads = n.v_heads;
  p.head_dim = n.head_dim, p.value_dim = n.value_dim;
  p.lse_head = n.queries, p.lse_batch = n.packed ? 0 : n.q_heads * n.queries;
  p.mask = {n.left < 0 ? kNoLimit : n.left, n.right < 0 ? kNoLimit : n.right};
  p.bias = {n.bias,           static_cast<BiasKind>(n.bias_kind),
            n.bias_stride[0], n.bias_stride[1],
            n.bias_stride[2], n.bias_stride[3]};
  p.scale = static_cast<float>(n.scale), p.softcap = static_cast<float>(n.softcap);
  p.dtype = static_cast<Dtype>(n.dtype);
  p.q_to_k = {n.kmap, n.maps_wide != 0, 1}, p.q_to_v = {n.vmap, n.maps_wide != 0, 1};
  p.queries = {{n.cu_q, false, 1}, n.queries};
  p.keys = {{n.cu_k, false, 1}, n.keys};
  const int64_t size = dtype_size(p.dtype);
  p.q_vectors = row_vectors(p.q, p.q_at, p.head_dim, size);
  p.k_vectors = row_vectors(p.k, p.k_at, p.head_dim, size);
  p.v_vectors = row_vectors(p.v, p.v_at, p.value_dim, size);
  p.out_at = layout(n.out_at);
  p.out_vectors = row_vectors(n.out, p.out_at, p.value_dim, size);
}

}  // namespace

API void emu_dha_attention(const Problem* n, void* out, float* lse) {
  ForwardArgs p{};
  fill(p, *n);
  p.out = out, p.lse = lse;
  with_dtype(n->dtype, [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim,
                      [&]<int kW>() { launch_dha_attention<T, kW>(p, nullptr); });
  });
}

API void emu_dha_attention_backward(const Problem* n) {
  BackwardArgs p{};
  fill(p, *n);
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
      launch_dha_backward<T, kW, Grad::q>(p, nullptr);
      launch_dha_backward<T, kW, Grad::k>(p, nullptr);
      launch_dha_backward<T, kW, Grad::v>(p, nullptr);
    });
  });
}
