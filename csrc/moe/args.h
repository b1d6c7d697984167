// SPDX-License-Identifier: Apache-2.0
// Argument checks that the ops of the family share. Their specification asks for RuntimeError where
// tensors do not fit each other or lie on other devices, and for IndexError of a bad index.
#pragma once

#include <optional>
#include <vector>

#include "core/check.h"
#include "core/contiguous.h"
#include "core/tensor.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// int32 or int64; else IndexError.
void check_index_dtype(const char* op, const char* arg, const Tensor& t);

// RuntimeError that names both devices.
void check_place(const char* op, const char* arg, const Tensor& t, const char* like_name,
                 const Tensor& like);

// RuntimeError that names both shapes; `layout` says what `arg` must be.
void check_fits(const char* op, const char* arg, const Tensor& t,
                std::initializer_list<int64_t> want, const char* layout, const char* like_name,
                const Tensor& like);

// 1 <= k <= experts.
void check_k(const char* op, int64_t k, int64_t experts);

// float32; else TypeError.
void check_float32(const char* op, const char* arg, const Tensor& t);

// Checked int32 values of a CPU tensor of int32 or int64, row-major: where they lie, or a copy.
struct IndexList {
  Tensor kept;
  std::vector<int32_t> copy;
  const int32_t* data;
};

// Values in [low, limit), else IndexError. Of a tensor elsewhere nothing is read, and data is null.
IndexList check_index_values(const char* op, const char* arg, const Tensor& t, int64_t low,
                             int64_t limit);

}  // namespace tenfold
