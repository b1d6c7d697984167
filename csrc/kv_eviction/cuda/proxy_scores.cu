// SPDX-License-Identifier: Apache-2.0
// CUDA registration of proxy_scores: tensors -> parameters, workspace, launch.
#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "kv_eviction/cuda/impl.h"
#include "kv_eviction/cuda/proxy_scores_kernel.cuh"

namespace tenfold::cuda {

std::tuple<Tensor, Tensor> proxy_scores(const char* op, const Tensor& q_in, const Tensor& k_in,
                                        const ProxyScoresArgs& a) {
  const ScoreReduce reduce = check_proxy_scores(op, q_in, k_in, a);
  const Launch launch(q_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in);
  const int64_t b = q.sizes()[0], hq = q.sizes()[1], w = q.sizes()[2];
  const int64_t hkv = k.sizes()[1], length = k.sizes()[2];
  const OptTensor positions = contiguous(a.q_positions);
  const Tensor scores = new_output(q, {b, hkv, length}, ScalarType::Float);
  Tensor lse = new_output(q, {b, hq, w}, ScalarType::Float);
  if (a.lse) torch::stable::copy_(lse, *a.lse);
  ProxyArgs p{};
  p.q = q.data_ptr(), p.k = k.data_ptr();
  p.lse = p.lse_out = data_as<float>(lse);
  p.scores = data_as<float>(scores);
  p.batch = b, p.q_heads = hq, p.kv_heads = hkv, p.num_proxies = w, p.length = length;
  p.head_dim = q.sizes()[3];
  for (int i = 0; i < 3; ++i) p.q_stride[i] = q.strides()[i], p.k_stride[i] = k.strides()[i];
  choose_vectors(p, dtype_size(to_dtype(q.scalar_type())));
  p.positions = int_array(positions);
  p.positions_per_row = positions && positions->dim() == 2;
  p.kv_start = int_array(a.kv_start);
  p.kv_lens = int_array(a.kv_lens);
  p.kmap = int_array(a.kmap);
  p.q_offset = a.q_offset == -1 ? length - w : a.q_offset;
  p.scale = static_cast<float>(a.scale);
  p.causal = a.causal;
  p.window = a.window;
  p.reduce = reduce;
  choose_splits(p);
  check_grid(op, b * hq * ((w + kTileRows - 1) / kTileRows) * p.splits);
  check_grid(op, b * hkv * ((length + kTileKeys - 1) / kTileKeys));
  const Tensor partial = new_output(q, {a.lse ? 0 : p.splits * b * hq * w * 2}, ScalarType::Float);
  p.partial = data_as<float>(partial);
  dispatch_dtype(q.scalar_type(), op,
                 [&]<class T>() { launch_proxy_scores<T>(p, a.lse.has_value(), launch.stream); });
  launch.check();
  return {scores, lse};
}

namespace {

std::tuple<Tensor, Tensor> proxy_scores_op(Tensor q, Tensor k, OptTensor lse, double scale,
                                           bool causal, int64_t q_offset, OptTensor q_positions,
                                           OptTensor kv_start, OptTensor kv_lens, int64_t window,
                                           std::string_view reduce, OptTensor kmap) {
  return proxy_scores(
      "proxy_scores", q, k,
      {lse, scale, causal, q_offset, q_positions, kv_start, kv_lens, window, reduce, kmap});
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("proxy_scores", TORCH_BOX(&tenfold::cuda::proxy_scores_op));
}
