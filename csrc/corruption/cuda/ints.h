// SPDX-License-Identifier: Apache-2.0
// Index tensors as kernels see them, and the two dtypes of tokens.
#pragma once

#include "core/convert.cuh"
#include "core/tensor.h"

namespace tenfold::cuda {

inline IntArray contiguous_ints(const Tensor& t) {
  return {t.data_ptr(), t.scalar_type() == ScalarType::Long, 1};
}

template <class F>
void dispatch_tokens(const Tensor& t, const F& f) {
  t.scalar_type() == ScalarType::Long ? f.template operator()<int64_t>()
                                      : f.template operator()<int32_t>();
}

}  // namespace tenfold::cuda
