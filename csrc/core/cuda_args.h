// SPDX-License-Identifier: Apache-2.0
// Small helpers of CUDA registrations: index tensors as kernel arguments, grid sizes, memory.
#pragma once

#include <optional>
#include <vector>

#include "core/convert.cuh"
#include "core/room.h"
#include "core/tensor.h"

namespace tenfold::cuda {

// View of an optional 1-d index tensor; flatten anything with more dims (made contiguous) first.
inline IntArray int_array(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->data_ptr(), t->scalar_type() == ScalarType::Long, t->dim() == 1 ? t->strides()[0] : 1};
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::optional<Tensor>();
}

// Grids are one-dimensional and CUDA allows 2^31 - 1 blocks.
inline void check_grid(const char* op, int64_t blocks) {
  TENFOLD_CHECK_VALUE(blocks < int64_t{1} << 31, "tenfold::", op, ": the problem needs ", blocks,
                      " CUDA blocks, at most 2^31 - 1 are possible; split the batch");
}

// The working memory of a call: freed to torch's allocator, in the order of the stream.
class DeviceMemory {
 public:
  explicit DeviceMemory(const Tensor& like) : like_(like) {}
  Room room() {
    return [this](int64_t bytes) {
      return held_.emplace_back(new_output(like_, {bytes}, ScalarType::Byte)).data_ptr();
    };
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> held_;
};

}  // namespace tenfold::cuda
