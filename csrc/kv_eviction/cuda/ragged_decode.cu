// SPDX-License-Identifier: Apache-2.0
// CUDA registration of ragged_decode.
#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "kv_eviction/cuda/impl.h"
#include "kv_eviction/cuda/ragged_decode_kernel.cuh"

namespace tenfold::cuda {
namespace {

std::tuple<Tensor, Tensor> ragged_decode_op(Tensor q, Tensor k_in, Tensor v_in, Tensor offsets,
                                            double scale, OptTensor lens) {
  constexpr auto op = "ragged_decode";
  check_ragged_decode(q, k_in, v_in, offsets, scale, lens);
  const int64_t d = k_in.sizes()[1], dv = v_in.sizes()[1];
  TENFOLD_CHECK_VALUE(d <= kMaxDim, "tenfold::ragged_decode: D must be <= ", kMaxDim,
                      " on CUDA, got k ", shape_str(k_in));
  const Launch launch(q);
  const Tensor k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const bool one = q.dim() == 3;
  DecodeArgs a{};
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
  a.batch = q.sizes()[0], a.q_heads = q.sizes()[1];
  a.num_queries = one ? 1 : q.sizes()[2];
  a.kv_heads = a.batch > 0 ? (offsets.sizes()[0] - 1) / a.batch : 0;
  a.group = a.kv_heads > 0 ? a.q_heads / a.kv_heads : 0;
  a.head_dim = d, a.value_dim = dv, a.total_rows = k.sizes()[0];
  a.q_stride[0] = q.strides()[0], a.q_stride[1] = q.strides()[1];
  a.q_stride[2] = one ? 0 : q.strides()[2], a.q_stride[3] = q.strides()[q.dim() - 1];
  a.k_stride = k.strides()[0], a.v_stride = v.strides()[0];
  a.k_vectors = key_vectors(a, dtype_size(to_dtype(q.scalar_type())));
  a.offsets = int_array(offsets);
  a.lens = int_array(lens);
  a.scale = static_cast<float>(scale);
  const auto type = q.scalar_type();
  const Tensor out = one ? new_output(q, {a.batch, a.q_heads, dv}, type)
                         : new_output(q, {a.batch, a.q_heads, a.num_queries, dv}, type);
  const Tensor lse = one ? new_output(q, {a.batch, a.q_heads}, ScalarType::Float)
                         : new_output(q, {a.batch, a.q_heads, a.num_queries}, ScalarType::Float);
  a.out = out.data_ptr();
  a.lse = data_as<float>(lse);
  check_grid(op, chunk_slots(a));
  check_grid(op, a.batch * a.q_heads * a.num_queries);
  const Tensor partial =
      new_output(q, {chunk_slots(a) * a.group * a.num_queries * (2 + dv)}, ScalarType::Float);
  a.partial = data_as<float>(partial);
  dispatch_dtype(type, op, [&]<class T>() { launch_ragged_decode<T>(a, launch.stream); });
  launch.check();
  return {out, lse};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("ragged_decode", TORCH_BOX(&tenfold::cuda::ragged_decode_op));
}
