// SPDX-License-Identifier: Apache-2.0
// The family's CPU entry points, for composition (nacl_evict) and registration.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "kv_eviction/ops.h"

namespace tenfold::cpu {

std::tuple<Tensor, Tensor> proxy_scores(const char* op, const Tensor& q, const Tensor& k,
                                        const ProxyScoresArgs& a);

std::tuple<Tensor, Tensor> nacl_select(const char* op, const Tensor& scores,
                                       const NaclSelectArgs& a);

std::tuple<Tensor, Tensor> kv_gather(const char* op, const Tensor& k, const Tensor& v,
                                     const Tensor& idx, const OptTensor& new_lens,
                                     const OptTensor& inv_freq, const OptTensor& kv_start);

// Valid slots [begin, end) of every sequence, checked against `length`.
struct KvRange {
  std::vector<int32_t> begin, end;
};
KvRange read_kv_range(const char* op, const OptTensor& kv_start, const OptTensor& kv_lens,
                      int64_t batch, int64_t length);

}  // namespace tenfold::cpu
