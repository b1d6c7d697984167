// SPDX-License-Identifier: Apache-2.0
// Checks that all ops of the family share: the layout of a batch, and tensors of that layout.
#pragma once

#include <optional>
#include <tuple>

#include "core/check.h"
#include "core/contiguous.h"
#include "core/tensor.h"
#include "rl/rows.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// Rows, and the tensor that holds their offsets.
struct Layout {
  Rows rows;
  OptTensor offsets;
};

// `t` [B, R], or [N] with cu_seqlens, whose values are checked if it is on a CPU.
Layout check_layout(const char* op, const char* arg, const Tensor& t, const OptTensor& cu_seqlens);

// A fresh [B, R] or [N].
Tensor new_tokens(const Tensor& like, const Layout& layout, ScalarType dtype);

Ints as_ints(const Tensor& t);

// Segments, int32 or int64, contiguous (copied if they are not), and their layout.
struct Segments {
  Layout layout;
  Tensor seg;

  SegmentRows rows() const { return {layout.rows, as_ints(seg)}; }
};
Segments check_seg(const char* op, const Tensor& seg, const OptTensor& cu_seqlens);

// float32, or float64 on a CPU, of the shape of `like`; contiguous.
Tensor check_rows(const char* op, const char* arg, const Tensor& t, const Tensor& like);

// [rows], dtype and device of `like`; contiguous.
Tensor check_vector(const char* op, const char* arg, const Tensor& t, const Tensor& like,
                    int64_t rows);

// [rows], int32 or int64; contiguous.
Tensor check_nseg(const char* op, const Tensor& nseg, const Tensor& like, int64_t rows);

// f<T>() for float32 or float64.
template <class F>
void with_real(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  f.template operator()<float>();
}

}  // namespace tenfold
