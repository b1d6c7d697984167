// SPDX-License-Identifier: Apache-2.0
// CUDA registration of fir_down2, fir_up2_cat and their gradients.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "diffusion/cuda/resample_kernel.cuh"
#include "diffusion/resample_ops.h"

namespace tenfold::cuda {
namespace {

void run_fir(const FirCall& c) {
  constexpr auto kOp = "fir";
  const Launch launch(c.y);
  FirArgs a{};
  a.kind = c.kind, a.x = c.in(), a.y = c.out();
  if (c.skip) a.skip = {c.skip->data_ptr(), c.skip->strides()[0], c.skip->strides()[1]};
  a.batch = c.batch, a.channels = c.channels, a.skipped = c.skipped();
  a.length = c.length, a.outputs = c.outputs;
  check_grid(kOp, fir_blocks(a));
  check_grid(kOp, fir_copy_blocks(a));
  dispatch_dtype(c.y.scalar_type(), kOp, [&]<class T>() { launch_fir<T>(a, launch.stream); });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::FirOps<&tenfold::cuda::run_fir>;
  m.impl("fir_down2", TORCH_BOX(&Ops::down));
  m.impl("fir_down2_", TORCH_BOX(&Ops::down_out));
  m.impl("fir_down2_backward", TORCH_BOX(&Ops::down_backward));
  m.impl("fir_up2_cat", TORCH_BOX(&Ops::up));
  m.impl("fir_up2_cat_", TORCH_BOX(&Ops::up_out));
  m.impl("fir_up2_backward", TORCH_BOX(&Ops::up_backward));
}
