// SPDX-License-Identifier: Apache-2.0
// The family's CUDA entry points, for composition (nacl_evict) and registration.
#pragma once

#include <tuple>

#include "core/cuda_args.h"
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

}  // namespace tenfold::cuda
