// SPDX-License-Identifier: Apache-2.0
// CUDA registration of vdiff_step. Values of times and of guidance are not checked.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "diffusion/cuda/kinds.h"
#include "diffusion/cuda/vdiff_kernel.cuh"
#include "diffusion/steps_ops.h"

namespace tenfold::cuda {
namespace {

void run_step(const StepCall& c) {
  constexpr auto kOp = "vdiff_step";
  const Launch launch(c.z);
  StepArgs a{};
  const auto data = [](const OptTensor& t) { return t ? t->data_ptr() : nullptr; };
  a.z = c.z.data_ptr(), a.v = c.v.data_ptr(), a.v_uncond = data(c.v_uncond);
  a.noise = data(c.noise), a.z_next = c.z_next.data_ptr(), a.x0_hat = data(c.x0_hat);
  a.t = per_sample(c.t), a.u = per_sample(c.u), a.options = c.options;
  if (c.guidance) a.guidance = per_sample(*c.guidance);
  a.samples = c.samples(), a.each = c.each();
  dispatch_velocity(c.z.scalar_type(), c.v.scalar_type(), kOp, [&]<class T, class V>() {
    check_grid(kOp, a.samples * vdiff_blocks<T, V>(a.each));
    launch_vdiff_step<T, V>(a, launch.stream);
  });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::StepOps<&tenfold::cuda::run_step>;
  m.impl("vdiff_step", TORCH_BOX(&Ops::step));
  m.impl("vdiff_step_", TORCH_BOX(&Ops::step_out));
}
