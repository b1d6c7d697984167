// SPDX-License-Identifier: Apache-2.0
// CUDA nacl_evict: proxy_scores, nacl_select and kv_gather in one call.
#include <torch/csrc/stable/library.h>

#include "kv_eviction/cuda/impl.h"

namespace tenfold::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> nacl_evict_op(
    Tensor q, Tensor k, Tensor v, OptTensor lse, double scale, bool causal, int64_t q_offset,
    OptTensor q_positions, OptTensor kv_start, OptTensor kv_lens, int64_t window,
    std::string_view reduce, OptTensor kmap, int64_t n_sink, int64_t n_recent, int64_t n_topk,
    int64_t n_random, double tau, std::string_view logits, int64_t seed, int64_t layer,
    OptTensor row_id, OptTensor counts, int64_t pool_kernel, std::string_view pool,
    OptTensor inv_freq) {
  constexpr auto op = "nacl_evict";
  check_float_dtype(op, "v", v);
  check_same_device(op, "k", k, "v", v);
  check_same_dtype(op, "k", k, "v", v);
  check_dim(op, "v", v, 4, "[B, HV, L, DV]");
  const auto [scores, row_lse] = proxy_scores(
      op, q, k,
      {lse, scale, causal, q_offset, q_positions, kv_start, kv_lens, window, reduce, kmap});
  const auto [idx, new_lens] =
      nacl_select(op, scores,
                  {n_sink, n_recent, n_topk, n_random, tau, logits, seed, layer, kv_start, kv_lens,
                   row_id, counts, pool_kernel, pool, false});
  const auto [k_new, v_new] = kv_gather(op, k, v, idx, new_lens, inv_freq, kv_start);
  return {k_new, v_new, idx, new_lens};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("nacl_evict", TORCH_BOX(&tenfold::cuda::nacl_evict_op));
}
