// SPDX-License-Identifier: Apache-2.0
// CUDA registration of the segmentation ops.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "rl/cuda/segments_kernel.cuh"
#include "rl/segments_ops.h"

namespace tenfold::cuda {
namespace {

std::tuple<Tensor, Tensor> run_segments(const Tensor& mask, const SegmentArgs& a) {
  const Launch launch(mask);
  const SegmentCall call = check_segments(mask, a);
  check_grid(a.op, call.p.rows.count);
  const Tensor spare = new_output(mask, {segment_spare(call.p)}, ScalarType::Long);
  launch_segments(call.p, data_as<int64_t>(spare), launch.stream);
  launch.check();
  return {call.seg, call.nseg};
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::SegmentOps<&tenfold::cuda::run_segments>;
  m.impl("macro_segment_fixed", TORCH_BOX(&Ops::fixed));
  m.impl("macro_segment_lengths", TORCH_BOX(&Ops::lengths));
  m.impl("macro_segment_ppl", TORCH_BOX(&Ops::ppl));
  m.impl("macro_segment_starts", TORCH_BOX(&Ops::starts));
}
