// SPDX-License-Identifier: Apache-2.0
// Checks that the ops of the family share.
#pragma once

#include <optional>

#include "core/row_ints.h"

namespace tenfold {

constexpr int64_t kMostColumns = (int64_t{1} << 31) - 1;
constexpr int64_t kMostSentinels = 1 << 16;

// Can be held by the dtype of `like`.
void check_id(const char* op, const char* arg, int64_t id, const Tensor& like);

// Sentinels are tokens, and EOS is none of them.
void check_sentinels(const char* op, const Tensor& like, int64_t first_sentinel,
                     int64_t num_sentinels, int64_t eos_id);

// Columns of a result, `least` to 2^31 - 1.
void check_columns(const char* op, const char* arg, int64_t columns, int64_t least);

// int32 or int64 [B, L] with contiguous rows.
Tensor check_tokens(const char* op, const char* arg, const Tensor& t);

// int32 or int64 [rows] beside `of`, contiguous; on the CPU all in [0, width].
Tensor check_lengths(const char* op, const char* arg, const Tensor& t, const char* of_name,
                     const Tensor& of, int64_t rows, int64_t width);

inline int64_t row_stride(const Tensor& t) {
  return t.numel() > 0 ? t.strides()[0] : 0;
}

}  // namespace tenfold
