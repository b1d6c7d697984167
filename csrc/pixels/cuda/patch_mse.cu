// SPDX-License-Identifier: Apache-2.0
// CUDA registration of patch_mse and its gradient. Values of weights and of denom are not checked.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "pixels/cuda/patch_mse_kernel.cuh"
#include "pixels/mse_ops.h"

namespace tenfold::cuda {
namespace {

const float* floats_of(const OptTensor& t) {
  return t ? data_as<float>(*t) : nullptr;
}

void run_mse(const MseCall& c) {
  const Launch launch(c.pred);
  DeviceMemory memory(c.pred);
  const Room room = memory.room();
  MseArgs a{};
  a.m = c.mse, a.made = c.made;
  a.denom = floats_of(c.given_denom), a.grad_loss = floats_of(c.grad_loss);
  if (a.denom == nullptr)
    a.of_weights = static_cast<double*>(room(kWeightBlocks * static_cast<int64_t>(sizeof(double))));
  if (c.loss) {
    a.loss = data_as<float>(*c.loss), a.denom_out = data_as<float>(*c.denom);
    a.of_errors =
        static_cast<double*>(room(mse_blocks(a.m) * static_cast<int64_t>(sizeof(double))));
  }
  dispatch_dtype(c.pred.scalar_type(), c.op, [&]<class T>() { launch_mse<T>(a, launch.stream); });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::MseOps<&tenfold::cuda::run_mse>;
  m.impl("patch_mse", TORCH_BOX(&Ops::loss));
  m.impl("patch_mse_forward", TORCH_BOX(&Ops::forward));
  m.impl("patch_mse_", TORCH_BOX(&Ops::over));
  m.impl("patch_mse_backward", TORCH_BOX(&Ops::backward));
  m.impl("patch_mse_backward_", TORCH_BOX(&Ops::backward_out));
}
