// SPDX-License-Identifier: Apache-2.0
#include "rl/rows_ops.h"

#include <algorithm>

namespace tenfold {
namespace {

// Width of the longest row.
int64_t check_offsets(const char* op, const Rows& rows) {
  const Ints& at = rows.offsets;
  TENFOLD_CHECK_VALUE(at[0] == 0, "tenfold::", op, ": cu_seqlens must begin with 0, got ", at[0]);
  int64_t longest = 0;
  for (int64_t i = 1; i <= rows.count; ++i) {
    TENFOLD_CHECK_VALUE(at[i] >= at[i - 1], "tenfold::", op, ": cu_seqlens must not fall, got ",
                        at[i], " after ", at[i - 1], " at [", i, "]");
    longest = std::max(longest, at[i] - at[i - 1]);
  }
  TENFOLD_CHECK_VALUE(at[rows.count] == rows.total, "tenfold::", op,
                      ": cu_seqlens must end with the number of tokens, ", rows.total, ", got ",
                      at[rows.count]);
  return longest;
}

}  // namespace

Layout check_layout(const char* op, const char* arg, const Tensor& t, const OptTensor& cu_seqlens) {
  if (!cu_seqlens) {
    TENFOLD_CHECK_VALUE(t.dim() == 2, "tenfold::", op, ": ", arg,
                        " must be [B, R] (or [N] with cu_seqlens), got ", shape_str(t));
    const int64_t rows = t.sizes()[0], width = t.sizes()[1];
    TENFOLD_CHECK_VALUE(width <= INT32_MAX, "tenfold::", op, ": ", arg,
                        " must have fewer than 2^31 columns, got ", width);
    return {{rows, width, rows * width, {}}, std::nullopt};
  }
  const Tensor& cu = *cu_seqlens;
  TENFOLD_CHECK_VALUE(t.dim() == 1, "tenfold::", op, ": ", arg,
                      " must be [N] with cu_seqlens, got ", shape_str(t));
  check_int_dtype(op, "cu_seqlens", cu);
  TENFOLD_CHECK_VALUE(cu.dim() == 1 && cu.sizes()[0] >= 1, "tenfold::", op,
                      ": cu_seqlens must be [B + 1], got ", shape_str(cu));
  check_same_device(op, "cu_seqlens", cu, arg, t);
  const int64_t total = t.sizes()[0];
  TENFOLD_CHECK_VALUE(total <= INT32_MAX, "tenfold::", op, ": ", arg,
                      " must have fewer than 2^31 tokens, got ", total);
  const Tensor offsets = as_contiguous(cu);
  Rows rows{cu.sizes()[0] - 1, total, total, as_ints(offsets)};
  if (cu.is_cpu()) rows.width = check_offsets(op, rows);
  return {rows, offsets};
}

Ints as_ints(const Tensor& t) {
  return {t.data_ptr(), t.scalar_type() == ScalarType::Long};
}

Tensor new_tokens(const Tensor& like, const Layout& layout, ScalarType dtype) {
  if (layout.offsets) return new_output(like, {layout.rows.total}, dtype);
  return new_output(like, {layout.rows.count, layout.rows.width}, dtype);
}

Segments check_seg(const char* op, const Tensor& seg, const OptTensor& cu_seqlens) {
  check_int_dtype(op, "seg", seg);
  return {check_layout(op, "seg", seg, cu_seqlens), as_contiguous(seg)};
}

Tensor check_rows(const char* op, const char* arg, const Tensor& t, const Tensor& like) {
  const auto s = t.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Float || (s == ScalarType::Double && t.is_cpu()),
                     "tenfold::", op, ": ", arg, " must be float32 (or float64 on a CPU), got ",
                     dtype_name(s));
  TENFOLD_CHECK_VALUE(same_sizes(t, like), "tenfold::", op, ": ", arg, " must be ", shape_str(like),
                      ", got ", shape_str(t));
  TENFOLD_CHECK_VALUE(t.device() == like.device(), "tenfold::", op, ": ", arg, " must be on ",
                      device_str(like), ", got ", device_str(t));
  return as_contiguous(t);
}

Tensor check_vector(const char* op, const char* arg, const Tensor& t, const Tensor& like,
                    int64_t rows) {
  TENFOLD_CHECK_TYPE(t.scalar_type() == like.scalar_type(), "tenfold::", op, ": ", arg, " must be ",
                     dtype_name(like.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  TENFOLD_CHECK_VALUE(t.dim() == 1 && t.sizes()[0] == rows, "tenfold::", op, ": ", arg,
                      " must be [", rows, "], got ", shape_str(t));
  TENFOLD_CHECK_VALUE(t.device() == like.device(), "tenfold::", op, ": ", arg, " must be on ",
                      device_str(like), ", got ", device_str(t));
  return as_contiguous(t);
}

Tensor check_nseg(const char* op, const Tensor& nseg, const Tensor& like, int64_t rows) {
  check_int_dtype(op, "nseg", nseg);
  TENFOLD_CHECK_VALUE(nseg.dim() == 1 && nseg.sizes()[0] == rows, "tenfold::", op,
                      ": nseg must be [", rows, "], got ", shape_str(nseg));
  TENFOLD_CHECK_VALUE(nseg.device() == like.device(), "tenfold::", op, ": nseg must be on ",
                      device_str(like), ", got ", device_str(nseg));
  return as_contiguous(nseg);
}

}  // namespace tenfold
