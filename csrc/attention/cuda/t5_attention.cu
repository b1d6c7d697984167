// SPDX-License-Identifier: Apache-2.0
// CUDA registration of t5_attention and its backward.
#include <torch/csrc/stable/library.h>

#include "attention/cuda/prefill_args.h"
#include "attention/cuda/t5_bias_kernel.cuh"
#include "attention/t5_ops.h"
#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"

namespace tenfold::cuda {
namespace {

// Head maps: there are none, every head is its own. IntArray reads memory, so that is what it gets.
__global__ void __launch_bounds__(128) t5_heads_kernel(int32_t* heads, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (i < count) heads[i] = static_cast<int32_t>(i);
}

T5Bias t5_bias(const Tensor& table, const T5Args& a) {
  AttentionBias b{};
  b.data = table.data_ptr();
  b.kind = table.scalar_type() == ScalarType::Float      ? BiasKind::f32
           : table.scalar_type() == ScalarType::BFloat16 ? BiasKind::bf16
                                                         : BiasKind::f16;
  b.row = table.strides()[0], b.head = table.strides()[1];
  return {t5_buckets(table, a), b, table.sizes()[1]};
}

template <class Params>
void fill_t5(OnDevice<Params>& p, const Tensor& q, const Tensor& k, const Tensor& v,
             const OptTensor& bias_table, const OptTensor& kv_len, const T5Args& a,
             const Room& room, cudaStream_t stream) {
  static_cast<AttentionParams&>(p) = t5_params(q, k, v, a);
  auto* const heads = static_cast<int32_t*>(room(std::max<int64_t>(p.q_heads, 1) * 4));
  if (p.q_heads > 0)
    TENFOLD_LAUNCH(t5_heads_kernel, static_cast<unsigned>((p.q_heads + 127) / 128), 128, stream,
                   heads, p.q_heads);
  p.q_to_k = p.q_to_v = {heads, false, 1};
  p.queries = {{}, p.max_q}, p.keys = {{}, p.max_k};
  p.kv_len = int_array(kv_len);
  const int64_t size = dtype_size(p.dtype);
  p.q_vectors = row_vectors(p.q, p.q_at, p.head_dim, size);
  p.k_vectors = row_vectors(p.k, p.k_at, p.head_dim, size);
  p.v_vectors = row_vectors(p.v, p.v_at, p.value_dim, size);
  if (!bias_table) return;
  // Memory grows with the distance of the last bucket.
  constexpr int64_t kMostDistance = 1 << 16;
  TENFOLD_CHECK_VALUE(a.max_distance <= kMostDistance,
                      "tenfold::t5_attention: max_distance must be at most ", kMostDistance,
                      " on CUDA, got ", a.max_distance);
  const T5Bias bias = t5_bias(*bias_table, a);
  auto* const lut = static_cast<float*>(room(std::max<int64_t>(t5_lut_floats(bias), 1) * 4));
  launch_t5_lut(bias, lut, stream);
  p.relative_lut = lut, p.reach = bucket_reach(bias.buckets);
}

std::tuple<Tensor, Tensor> t5_attention_op(Tensor q_in, Tensor k_in, Tensor v_in,
                                           OptTensor bias_table, OptTensor kv_len,
                                           bool bidirectional, bool causal, int64_t max_distance,
                                           int64_t q_offset, double dropout_p, int64_t seed,
                                           int64_t offset, double scale) {
  constexpr auto op = "t5_attention";
  const T5Args a{bidirectional, causal, max_distance, q_offset, dropout_p, seed, offset, scale};
  check_t5_attention(op, q_in, k_in, v_in, bias_table, kv_len, a);
  const Launch launch(q_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in);
  const Tensor v = with_contiguous_rows(v_in);
  const Tensor out = new_like_rows(q_in, v.sizes()[3]), lse = new_lse(q);
  DeviceMemory memory(q);
  ForwardArgs p{};
  fill_t5(p, q, k, v, bias_table, kv_len, a, memory.room(), launch.stream);
  p.out = out.data_ptr(), p.out_at = row_layout(out), p.lse = data_as<float>(lse);
  p.out_vectors = row_vectors(p.out, p.out_at, p.value_dim, dtype_size(p.dtype));
  dispatch_dtype(q.scalar_type(), op, [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim, [&]<int kW>() {
      check_grid(op, forward_blocks<T, kW>(p));
      launch_dha_attention<T, kW, true>(p, launch.stream);
    });
  });
  launch.check();
  return {out, lse};
}

template <class T, int kW>
void launch_t5_backward(const char* op, BackwardArgs& p, const OptTensor& bias_table,
                        const T5Args& a, const Tensor& dtable, const Room& room,
                        cudaStream_t stream) {
  for (const int64_t blocks :
       {(p.batch * p.q_heads * p.queries.length + 3) / 4, backward_blocks<T, kW, Grad::q>(p),
        backward_blocks<T, kW, Grad::k>(p), backward_blocks<T, kW, Grad::v>(p)})
    check_grid(op, blocks);
  T5Sums sums{};
  if (bias_table) {
    sums.of_head = sums_of_head<T, kW>(p), sums.pitch = sums_pitch<T, kW>(p.reach);
    sums.heads = p.q_heads;
    p.sums_pitch = static_cast<int>(sums.pitch);
    p.sums =
        static_cast<float*>(room(std::max<int64_t>(sums.heads * sums.of_head * sums.pitch, 1) * 4));
    sums.buckets = t5_buckets(*bias_table, a), sums.sums = p.sums;
    sums.dtable = data_as<float>(dtable);
  }
  launch_dha_backward<T, kW, Grad::q, true>(p, stream);
  launch_dha_backward<T, kW, Grad::k, true>(p, stream);
  launch_dha_backward<T, kW, Grad::v, true>(p, stream);
  if (bias_table) launch_t5_table(sums, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> t5_attention_backward_op(
    Tensor dout_in, Tensor q_in, Tensor k_in, Tensor v_in, OptTensor bias_table, OptTensor kv_len,
    Tensor out_in, Tensor lse_in, bool bidirectional, bool causal, int64_t max_distance,
    int64_t q_offset, double dropout_p, int64_t seed, int64_t offset, double scale,
    OptTensor dlse_in) {
  constexpr auto op = "t5_attention_backward";
  const T5Args a{bidirectional, causal, max_distance, q_offset, dropout_p, seed, offset, scale};
  check_t5_attention(op, q_in, k_in, v_in, bias_table, kv_len, a);
  check_attention_backward(op, dout_in, q_in, v_in, out_in, lse_in, dlse_in, false);
  const Launch launch(q_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in);
  const Tensor v = with_contiguous_rows(v_in), out = with_contiguous_rows(out_in);
  const Tensor dout = with_contiguous_rows(dout_in), lse = torch::stable::contiguous(lse_in);
  const OptTensor dlse = contiguous(dlse_in);
  const Tensor delta = new_lse(q), dtable = new_t5_table(q, bias_table);
  const Tensor dq = new_like_rows(q_in, q.sizes()[3]), dk = new_like_rows(k_in, k.sizes()[3]);
  const Tensor dv = new_like_rows(v_in, v.sizes()[3]);
  DeviceMemory memory(q);
  BackwardArgs p{};
  fill_t5(p, q, k, v, bias_table, kv_len, a, memory.room(), launch.stream);
  set_gradients(p, dout, out, dq, dk, dv);
  p.lse = data_as<float>(lse), p.delta = data_as<float>(delta);
  p.dlse = dlse ? data_as<float>(*dlse) : nullptr;
  dispatch_dtype(q.scalar_type(), op, [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim, [&]<int kW>() {
      launch_t5_backward<T, kW>(op, p, bias_table, a, dtable, memory.room(), launch.stream);
    });
  });
  launch.check();
  if (!bias_table || bias_table->scalar_type() == ScalarType::Float) return {dq, dk, dv, dtable};
  return {dq, dk, dv, torch::stable::to(dtable, bias_table->scalar_type())};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("t5_attention", TORCH_BOX(&tenfold::cuda::t5_attention_op));
  m.impl("t5_attention_backward", TORCH_BOX(&tenfold::cuda::t5_attention_backward_op));
}
