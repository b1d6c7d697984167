// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/tensor.h"

namespace tenfold {

// `t` itself if it is contiguous: a call of the dispatcher costs as much as a small kernel.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace tenfold
