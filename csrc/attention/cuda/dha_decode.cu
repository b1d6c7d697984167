// SPDX-License-Identifier: Apache-2.0
// CUDA registration of dha_decode.
#include <torch/csrc/stable/library.h>

#include "attention/cuda/decode_launch.h"
#include "attention/decode_ops.h"
#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"

namespace tenfold::cuda {
namespace {

// Whether rows of a cache can be read as 16-byte vectors.
bool cache_vectors(const Tensor& t, const CacheStrides& at, int64_t dims, Dtype dtype) {
  const int64_t bits = (at.batch | at.token | at.head | dims) * dtype_size(dtype);
  return (reinterpret_cast<uintptr_t>(t.data_ptr()) | static_cast<uintptr_t>(bits)) % 16 == 0;
}

std::tuple<Tensor, Tensor> dha_decode_op(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kmap,
                                         Tensor vmap, Tensor kv_lens, OptTensor block_table,
                                         int64_t block_size, std::optional<double> scale,
                                         int64_t window_left, int64_t num_splits,
                                         OptTensor kv_start, OptTensor offsets, double softcap) {
  constexpr auto op = "dha_decode";
  check_dha_decode(
      q, k_cache, v_cache, kmap, vmap, kv_lens,
      {block_table, block_size, scale, window_left, num_splits, kv_start, offsets, softcap});
  const Launch launch(q);
  const Tensor k = with_contiguous_rows(k_cache), v = with_contiguous_rows(v_cache);
  const OptTensor blocks = contiguous(block_table);
  DhaDecodeOnDevice p{};
  static_cast<DhaDecodeParams&>(p) = check_dha_decode(
      q, k, v, kmap, vmap, kv_lens,
      {block_table, block_size, scale, window_left, num_splits, kv_start, offsets, softcap});
  p.q_data = q.data_ptr(), p.k_data = k.data_ptr(), p.v_data = v.data_ptr();
  p.kmap = int_array(kmap), p.vmap = int_array(vmap), p.kv_lens = int_array(kv_lens);
  p.kv_start = int_array(kv_start), p.offsets = int_array(offsets), p.blocks = int_array(blocks);
  p.table_width = blocks ? blocks->sizes()[1] : 0;
  p.k_vectors = cache_vectors(k, p.k, p.head_dim, p.dtype);
  p.v_vectors = cache_vectors(v, p.v, p.value_dim, p.dtype);
  const bool one = q.dim() == 3;
  const Tensor out =
      one ? new_output(q, {p.batch, p.q_heads, p.value_dim}, q.scalar_type())
          : new_output(q, {p.batch, p.q_heads, p.num_queries, p.value_dim}, q.scalar_type());
  const Tensor lse = one ? new_output(q, {p.batch, p.q_heads}, ScalarType::Float)
                         : new_output(q, {p.batch, p.q_heads, p.num_queries}, ScalarType::Float);
  p.out = out.data_ptr(), p.lse = data_as<float>(lse);
  dispatch_dtype(q.scalar_type(), op, [&]<class T>() {
    dispatch_width<T>(p.head_dim, p.value_dim, [&]<int kW>() {
      const int64_t floats = plan_dha_decode<T, kW>(p);
      const Tensor partial = new_output(q, {floats}, ScalarType::Float);
      p.partial = floats > 0 ? data_as<float>(partial) : nullptr;
      check_grid(op, decode_blocks<T, kW>(p));
      launch_dha_decode<T, kW>(p, launch.stream);
    });
  });
  launch.check();
  return {out, lse};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("dha_decode", TORCH_BOX(&tenfold::cuda::dha_decode_op));
}
