// SPDX-License-Identifier: Apache-2.0
// CUDA registration: tensors -> raw pointers, launch.
#include <torch/csrc/stable/library.h>

#include "_template/cuda/template_scale_kernel.cuh"
#include "_template/ops.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tenfold::cuda {
namespace {

Tensor template_scale_op(Tensor x_in, double scale) {
  check_template_scale(x_in, scale);
  const Launch launch(x_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor y = torch::stable::empty_like(x);
  dispatch_dtype(x.scalar_type(), "template_scale", [&]<class T>() {
    launch_template_scale(data_as<const T>(x), data_as<T>(y), x.numel(), static_cast<float>(scale),
                          launch.stream);
  });
  launch.check();
  return y;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("template_scale", TORCH_BOX(&tenfold::cuda::template_scale_op));
}
