// SPDX-License-Identifier: Apache-2.0
#include "corruption/rows_ops.h"

#include <limits>

namespace tenfold {

void check_id(const char* op, const char* arg, int64_t id, const Tensor& like) {
  if (like.scalar_type() == ScalarType::Long) return;
  using Limits = std::numeric_limits<int32_t>;
  TENFOLD_CHECK_VALUE(id >= Limits::min() && id <= Limits::max(), "tenfold::", op, ": ", arg, " ",
                      id, " does not fit into int32, the dtype of the tokens");
}

void check_sentinels(const char* op, const Tensor& like, int64_t first_sentinel,
                     int64_t num_sentinels, int64_t eos_id) {
  check_id(op, "first_sentinel", first_sentinel, like);
  check_id(op, "eos_id", eos_id, like);
  TENFOLD_CHECK_VALUE(
      num_sentinels >= 1 && first_sentinel >= num_sentinels - 1 && num_sentinels <= kMostSentinels,
      "tenfold::", op, ": num_sentinels must be 1 to ", kMostSentinels,
      ", and the num_sentinels - 1 ids below first_sentinel must be at least 0; ",
      "got first_sentinel ", first_sentinel, " and num_sentinels ", num_sentinels);
  TENFOLD_CHECK_VALUE(eos_id > first_sentinel || eos_id <= first_sentinel - num_sentinels,
                      "tenfold::", op, ": eos_id ", eos_id, " is a sentinel; those are ",
                      first_sentinel - num_sentinels + 1, " to ", first_sentinel);
}

void check_columns(const char* op, const char* arg, int64_t columns, int64_t least) {
  TENFOLD_CHECK_VALUE(columns >= least && columns <= kMostColumns, "tenfold::", op, ": ", arg,
                      " must be ", least, " to ", kMostColumns, ", got ", columns);
}

Tensor check_tokens(const char* op, const char* arg, const Tensor& t) {
  check_int_dtype(op, arg, t);
  check_dim(op, arg, t, 2, "[B, L]");
  check_columns(op, "columns of a tensor of tokens", t.sizes()[1], 0);
  return with_contiguous_rows(t);
}

Tensor check_lengths(const char* op, const char* arg, const Tensor& t, const char* of_name,
                     const Tensor& of, int64_t rows, int64_t width) {
  check_int_dtype(op, arg, t);
  check_sizes(op, arg, t, {rows}, "[B]");
  check_same_device(op, of_name, of, arg, t);
  Tensor lengths = as_contiguous(t);
  if (!t.is_cpu()) return lengths;
  const RowInts values(lengths);
  for (int64_t i = 0; i < rows; ++i)
    TENFOLD_CHECK_INDEX(values[i] >= 0 && values[i] <= width, "tenfold::", op, ": ", arg, "[", i,
                        "] = ", values[i], " must be in [0, ", width, "]");
  return lengths;
}

}  // namespace tenfold
