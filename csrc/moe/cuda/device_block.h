// SPDX-License-Identifier: Apache-2.0
// From checked tensors to what the launches of expert blocks take.
#pragma once

#include "core/cuda_args.h"
#include "moe/cuda/experts_launch.h"
#include "moe/experts_ops.h"

namespace tenfold::cuda {

inline DeviceRows device_rows(const Tensor& t) {
  return {t.data_ptr(), t.strides()[t.dim() - 2]};
}

inline DeviceMatrices device_matrices(const Tensor& t) {
  return {t.data_ptr(), t.strides()[0], t.strides()[1]};
}

inline void fill_routing(RoutedTokens* to, const RoutedCall& c) {
  to->x = device_rows(c.x);
  to->index = int_array(c.index);
  to->weight = data_as<const float>(c.weight);
  to->tokens = c.tokens, to->dim = c.dim, to->k = c.k;
  to->experts = c.experts, to->ffn = c.ffn;
}

inline void* data_if(bool wanted, const Tensor& t) {
  return wanted ? t.data_ptr() : nullptr;
}

}  // namespace tenfold::cuda
