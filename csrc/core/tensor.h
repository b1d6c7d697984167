// SPDX-License-Identifier: Apache-2.0
// Tensor helpers of the registration layer: allocation and small index tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "core/check.h"

namespace tenfold {

// Fresh uninitialised output on the device of `like`. CPU outputs of 4 MB and more are advised to
// huge pages: first-touch page faults otherwise cost more than a memory-bound kernel.
Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                  ScalarType dtype);

// `t` itself if its last dimension is contiguous, else a contiguous copy.
Tensor with_contiguous_rows(const Tensor& t);

bool same_sizes(const Tensor& a, const Tensor& b);

// One block of memory without gaps or overlaps, in some order of the dims: "storage order".
bool is_dense(const Tensor& t);

// Elements of two tensors of one shape lie in the same order.
bool same_order(const Tensor& a, const Tensor& b);

template <class T>
T* data_as(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Copies a CPU int32 / int64 tensor of any strides and up to 3 dims into a vector, row-major.
template <class Int>
std::vector<Int> read_ints(const Tensor& t);

}  // namespace tenfold
