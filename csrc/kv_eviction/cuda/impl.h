// The family's CUDA entry points, for composition (nacl_evict) and registration.
#pragma once

#include <tuple>

#include "core/convert.cuh"
#include "core/stream.h"
#include "core/tensor.h"
#include "kv_eviction/ops.h"

namespace tenfold::cuda {

std::tuple<Tensor, Tensor> proxy_scores(const char* op, const Tensor& q, const Tensor& k,
                                        const ProxyScoresArgs& a);

std::tuple<Tensor, Tensor> nacl_select(const char* op, const Tensor& scores,
                                       const NaclSelectArgs& a);

std::tuple<Tensor, Tensor> kv_gather(const char* op, const Tensor& k, const Tensor& v,
                                     const Tensor& idx, const OptTensor& new_lens,
                                     const OptTensor& inv_freq, const OptTensor& kv_start);

// View of an optional 1-d index tensor; flatten anything with more dims (made contiguous) first.
inline IntArray int_array(const OptTensor& t) {
  if (!t) return {};
  return {t->data_ptr(), t->scalar_type() == ScalarType::Long, t->dim() == 1 ? t->strides()[0] : 1};
}

inline OptTensor contiguous(const OptTensor& t) {
  return t ? OptTensor(torch::stable::contiguous(*t)) : OptTensor();
}

// Grids are one-dimensional and CUDA allows 2^31 - 1 blocks.
inline void check_grid(const char* op, int64_t blocks) {
  TENFOLD_CHECK_VALUE(blocks < int64_t{1} << 31, "tenfold::", op, ": the problem needs ", blocks,
                      " CUDA blocks, at most 2^31 - 1 are possible; split the batch");
}

}  // namespace tenfold::cuda
