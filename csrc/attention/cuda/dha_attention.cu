// SPDX-License-Identifier: Apache-2.0
// CUDA registration of dha_attention and its backward.
#include <torch/csrc/stable/library.h>

#include "attention/cuda/prefill_args.h"
#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"

namespace tenfold::cuda {
namespace {

// What forward and backward have in common; without a key or value head there is nothing to see.
template <class Params>
void fill_common(OnDevice<Params>& p, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& kmap, const Tensor& vmap, const AttentionArgs& a) {
  static_cast<AttentionParams&>(p) = attention_params(q, k, v, a);
  const bool varlen = a.cu_seqlens_q.has_value(), empty = p.k_heads == 0 || p.v_heads == 0;
  p.q_to_k = int_array(kmap), p.q_to_v = int_array(vmap);
  p.queries = {int_array(a.cu_seqlens_q), varlen ? q.sizes()[0] : q.sizes()[2]};
  p.keys = {int_array(a.cu_seqlens_k), empty ? 0 : varlen ? k.sizes()[0] : k.sizes()[2]};
  const int64_t size = dtype_size(p.dtype);
  p.q_vectors = row_vectors(p.q, p.q_at, p.head_dim, size);
  p.k_vectors = row_vectors(p.k, p.k_at, p.head_dim, size);
  p.v_vectors = row_vectors(p.v, p.v_at, p.value_dim, size);
}

std::tuple<Tensor, Tensor> dha_attention_op(Tensor q_in, Tensor k_in, Tensor v_in, Tensor kmap,
                                            Tensor vmap, std::optional<double> scale, bool causal,
                                            int64_t window_left, OptTensor cu_seqlens_q,
                                            OptTensor cu_seqlens_k, int64_t max_q, int64_t max_k,
                                            OptTensor attn_bias, double softcap,
                                            int64_t window_right) {
  constexpr auto op = "dha_attention";
  const AttentionArgs a{scale,        causal, window_left, window_right, cu_seqlens_q,
                        cu_seqlens_k, max_q,  max_k,       attn_bias,    softcap};
  check_attention(op, q_in, k_in, v_in, kmap, vmap, a);
  const Launch launch(q_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in);
  const Tensor v = with_contiguous_rows(v_in);
  const Tensor out = new_like_rows(q_in, v.sizes()[v.dim() - 1]), lse = new_lse(q);
  ForwardArgs p{};
  fill_common(p, q, k, v, kmap, vmap, a);
  p.out = out.data_ptr(), p.out_at = row_layout(out), p.lse = data_as<float>(lse);
  p.out_vectors = row_vectors(p.out, p.out_at, p.value_dim, dtype_size(p.dtype));
  dispatch_dtype(q.scalar_type(), op, [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim, [&]<int kW>() {
      check_grid(op, forward_blocks<T, kW>(p));
      launch_dha_attention<T, kW>(p, launch.stream);
    });
  });
  launch.check();
  return {out, lse};
}

template <class T, int kW>
void launch_backward(const char* op, const BackwardArgs& p, cudaStream_t stream) {
  const int64_t delta_blocks =
      ((p.queries.cu.given() ? 1 : p.batch) * p.q_heads * p.queries.length + 3) / 4;
  for (const int64_t blocks :
       {delta_blocks, backward_blocks<T, kW, Grad::q>(p), backward_blocks<T, kW, Grad::k>(p),
        backward_blocks<T, kW, Grad::v>(p)})
    check_grid(op, blocks);
  launch_dha_backward<T, kW, Grad::q>(p, stream);
  launch_dha_backward<T, kW, Grad::k>(p, stream);
  launch_dha_backward<T, kW, Grad::v>(p, stream);
}

// `deterministic` asks for no more than what these kernels always do.
std::tuple<Tensor, Tensor, Tensor> dha_attention_backward_op(
    Tensor dout_in, Tensor q_in, Tensor k_in, Tensor v_in, Tensor out_in, Tensor lse_in,
    Tensor kmap, Tensor vmap, std::optional<double> scale, bool causal, int64_t window_left,
    OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, int64_t max_q, int64_t max_k,
    OptTensor attn_bias, double softcap, int64_t window_right, OptTensor dlse_in,
    bool /*deterministic*/) {
  constexpr auto op = "dha_attention_backward";
  const AttentionArgs a{scale,        causal, window_left, window_right, cu_seqlens_q,
                        cu_seqlens_k, max_q,  max_k,       attn_bias,    softcap};
  check_attention(op, q_in, k_in, v_in, kmap, vmap, a);
  check_attention_backward(op, dout_in, q_in, v_in, out_in, lse_in, dlse_in, q_in.dim() == 3);
  const Launch launch(q_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in);
  const Tensor v = with_contiguous_rows(v_in), out = with_contiguous_rows(out_in);
  const Tensor dout = with_contiguous_rows(dout_in), lse = torch::stable::contiguous(lse_in);
  const OptTensor dlse = contiguous(dlse_in);
  const Tensor delta = new_lse(q);
  const Tensor dq = new_like_rows(q_in, q.sizes()[q.dim() - 1]);
  Tensor dk = new_like_rows(k_in, k.sizes()[k.dim() - 1]);
  Tensor dv = new_like_rows(v_in, v.sizes()[v.dim() - 1]);
  BackwardArgs p{};
  fill_common(p, q, k, v, kmap, vmap, a);
  set_gradients(p, dout, out, dq, dk, dv);
  p.lse = data_as<float>(lse), p.delta = data_as<float>(delta);
  p.dlse = dlse ? data_as<float>(*dlse) : nullptr;
  dispatch_dtype(q.scalar_type(), op, [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim,
                      [&]<int kW>() { launch_backward<T, kW>(op, p, launch.stream); });
  });
  if (p.k_heads == 0 || p.v_heads == 0) {  // no tiles of keys: nothing wrote these
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  launch.check();
  return {dq, dk, dv};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("dha_attention", TORCH_BOX(&tenfold::cuda::dha_attention_op));
  m.impl("dha_attention_backward", TORCH_BOX(&tenfold::cuda::dha_attention_backward_op));
}
