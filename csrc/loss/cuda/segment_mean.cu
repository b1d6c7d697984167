// SPDX-License-Identifier: Apache-2.0
// CUDA registration of segment_mean and its backward.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "loss/cuda/segment_mean_kernel.cuh"
#include "loss/segment_mean.h"

namespace tenfold::cuda {
namespace {

Tensor run(const char* op, const SegmentMeanCall& c, bool backward) {
  check_grid(op, c.rows);
  TENFOLD_CHECK_VALUE(c.length <= INT32_MAX, "tenfold::", op,
                      ": seg must have fewer than 2^31 columns, got ", c.length);
  const Launch launch(c.x);
  const Tensor out = new_output(c.x, {c.rows, backward ? c.length : c.segments}, ScalarType::Float);
  const Tensor spare = new_output(c.x, {segment_spare(c.rows, c.segments)}, ScalarType::Int);
  launch_segment_mean({data_as<const float>(c.x),
                       {c.seg.data_ptr(), c.seg.scalar_type() == ScalarType::Long, 1},
                       c.rows,
                       c.length,
                       c.segments,
                       data_as<int>(spare),
                       data_as<float>(out)},
                      backward, launch.stream);
  launch.check();
  return out;
}

Tensor segment_mean_op(Tensor nll, Tensor seg, int64_t segments) {
  constexpr auto kOp = "segment_mean";
  return run(kOp, check_segment_mean(kOp, "nll", false, nll, seg, segments), false);
}

Tensor segment_mean_backward_op(Tensor grad, Tensor seg, int64_t segments) {
  constexpr auto kOp = "segment_mean_backward";
  return run(kOp, check_segment_mean(kOp, "grad", true, grad, seg, segments), true);
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("segment_mean", TORCH_BOX(&tenfold::cuda::segment_mean_op));
  m.impl("segment_mean_backward", TORCH_BOX(&tenfold::cuda::segment_mean_backward_op));
}
