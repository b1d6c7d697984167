// SPDX-License-Identifier: Apache-2.0
// CUDA registration of nacl_select.
#include <torch/csrc/stable/library.h>

#include "kv_eviction/cuda/impl.h"
#include "kv_eviction/cuda/nacl_select_kernel.cuh"

namespace tenfold::cuda {
namespace {

// The one check that has to wait for the device; only on request.
void check_no_nan(const char* op, const Tensor& scores, const Launch& launch) {
  std::vector<float> host(scores.numel());
  TENFOLD_CUDA_CHECK(cudaMemcpyAsync(host.data(), scores.data_ptr(), host.size() * 4,
                                     cudaMemcpyDeviceToHost, launch.stream));
  TENFOLD_CUDA_CHECK(cudaStreamSynchronize(launch.stream));
  for (size_t i = 0; i < host.size(); ++i)
    TENFOLD_CHECK_VALUE(host[i] == host[i], "tenfold::", op,
                        ": scores contain NaN (check_nan=True), first at flat index ", i);
}

}  // namespace

std::tuple<Tensor, Tensor> nacl_select(const char* op, const Tensor& scores_in,
                                       const NaclSelectArgs& a) {
  SelectArgs s{};
  s.p = check_nacl_select(op, scores_in, a);
  const Launch launch(scores_in);
  const Tensor scores = torch::stable::contiguous(scores_in);
  if (a.check_nan) check_no_nan(op, scores, launch);
  const OptTensor counts = contiguous(a.counts);
  const Tensor idx = new_output(scores, {s.p.batch, s.p.heads, s.p.width}, ScalarType::Long);
  Tensor new_lens = s.p.counts_per_head
                        ? new_output(scores, {s.p.batch, s.p.heads}, ScalarType::Int)
                        : new_output(scores, {s.p.batch}, ScalarType::Int);
  if (s.p.heads == 0) torch::stable::zero_(new_lens);
  const Tensor keys = new_output(scores, {s.p.batch, s.p.heads, s.p.length}, ScalarType::Int);
  s.scores = data_as<float>(scores);
  s.kv_start = int_array(a.kv_start);
  s.kv_lens = int_array(a.kv_lens);
  s.row_id = int_array(a.row_id);
  s.counts = int_array(counts);
  s.counts.stride = 1;
  s.keys = data_as<uint32_t>(keys);
  s.idx = data_as<int64_t>(idx);
  s.new_lens = data_as<int32_t>(new_lens);
  check_grid(op, s.p.batch * s.p.heads);
  launch_nacl_select(s, launch.stream);
  launch.check();
  return {idx, new_lens};
}

namespace {

std::tuple<Tensor, Tensor> nacl_select_op(Tensor scores, int64_t n_sink, int64_t n_recent,
                                          int64_t n_topk, int64_t n_random, double tau,
                                          std::string_view logits, int64_t seed, int64_t layer,
                                          OptTensor kv_start, OptTensor kv_lens, OptTensor row_id,
                                          OptTensor counts, int64_t pool_kernel,
                                          std::string_view pool, bool check_nan) {
  return nacl_select("nacl_select", scores,
                     {n_sink, n_recent, n_topk, n_random, tau, logits, seed, layer, kv_start,
                      kv_lens, row_id, counts, pool_kernel, pool, check_nan});
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("nacl_select", TORCH_BOX(&tenfold::cuda::nacl_select_op));
}
