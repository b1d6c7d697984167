// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of selective_logprob share: argument checks.
#pragma once

#include "core/check.h"
#include "core/tensor.h"

namespace tenfold {

struct LogprobCall {
  Tensor logits, ids;  // [N, V] with contiguous rows; [N], contiguous
  int64_t rows, vocab, row_stride;
};

LogprobCall check_logprob(const char* op, const Tensor& logits, const Tensor& ids,
                          double temperature);

inline int64_t id_at(const Tensor& ids, int64_t i) {
  return ids.scalar_type() == ScalarType::Long ? data_as<int64_t>(ids)[i]
                                               : data_as<int32_t>(ids)[i];
}

}  // namespace tenfold
