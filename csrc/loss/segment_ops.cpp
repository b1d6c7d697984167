// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of segment_mean.
#include <torch/csrc/stable/library.h>

#include "core/contiguous.h"
#include "loss/segment_mean.h"

namespace tenfold {

SegmentMeanCall check_segment_mean(const char* op, const char* arg, bool backward, const Tensor& x,
                                   const Tensor& seg, int64_t segments) {
  TENFOLD_CHECK_TYPE(x.scalar_type() == ScalarType::Float, "tenfold::", op, ": ", arg,
                     " must be float32, got ", dtype_name(x.scalar_type()));
  check_int_dtype(op, "seg", seg);
  check_dim(op, "seg", seg, 2, "[N, S]");
  TENFOLD_CHECK_VALUE(segments >= 0 && segments <= INT32_MAX, "tenfold::", op,
                      ": T must be in [0, 2^31), got ", segments);
  const int64_t rows = seg.sizes()[0], length = seg.sizes()[1];
  if (backward) {
    check_sizes(op, arg, x, {rows, segments}, "[N, T]");
  } else {
    check_sizes(op, arg, x, {rows, length}, "[N, S]");
  }
  check_same_device(op, arg, x, "seg", seg);
  return {as_contiguous(x), as_contiguous(seg), rows, length, segments};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("segment_mean(Tensor nll, Tensor seg, int T) -> Tensor");
  m.def("segment_mean_backward(Tensor grad, Tensor seg, int T) -> Tensor");
}
