// SPDX-License-Identifier: Apache-2.0
// CUDA registration of vdiff_noise, vdiff_noise_rng and vdiff_loss. Values of times are not
// checked.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "diffusion/cuda/kinds.h"
#include "diffusion/cuda/vdiff_kernel.cuh"
#include "diffusion/velocity_ops.h"

namespace tenfold::cuda {
namespace {

void run_noise(const NoiseCall& c) {
  constexpr auto kOp = "vdiff_noise";
  const Launch launch(c.x0);
  NoiseArgs a{};
  a.x0 = c.x0.data_ptr(), a.noise = c.noise ? c.noise->data_ptr() : nullptr;
  a.z = c.z_data(), a.v = c.v_data(), a.t = per_sample(c.t), a.stream = c.stream;
  a.samples = c.samples(), a.each = c.each();
  dispatch_dtype(c.x0.scalar_type(), kOp, [&]<class T>() {
    check_grid(kOp, a.samples * vdiff_blocks<T, T>(a.each));
    launch_vdiff_noise<T>(a, launch.stream);
  });
  launch.check();
}

void run_loss(const LossCall& c) {
  constexpr auto kOp = "vdiff_loss";
  const Launch launch(c.x0);
  DeviceMemory memory(c.x0);
  LossArgs a{};
  a.v_hat = c.v_hat.data_ptr(), a.x0 = c.x0.data_ptr(), a.noise = c.noise.data_ptr();
  a.t = per_sample(c.t), a.samples = c.samples(), a.each = c.each();
  const Tensor grad = c.grad ? torch::stable::contiguous(*c.grad) : c.result;
  if (c.grad) {
    a.grad_loss = data_as<float>(grad), a.grad = c.result.data_ptr();
  } else {
    a.loss = data_as<float>(c.result);
  }
  dispatch_velocity(c.x0.scalar_type(), c.v_hat.scalar_type(), kOp, [&]<class T, class V>() {
    const int64_t blocks = a.samples * vdiff_blocks<T, V>(a.each);
    check_grid(kOp, blocks);
    if (!c.grad) a.parts = static_cast<double*>(memory.room()(8 * blocks + 8));
    launch_vdiff_loss<T, V>(a, launch.stream);
  });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::VelocityOps<&tenfold::cuda::run_noise, &tenfold::cuda::run_loss>;
  m.impl("vdiff_noise", TORCH_BOX(&Ops::noise));
  m.impl("vdiff_noise_", TORCH_BOX(&Ops::noise_out));
  m.impl("vdiff_noise_rng", TORCH_BOX(&Ops::noise_rng));
  m.impl("vdiff_noise_rng_", TORCH_BOX(&Ops::noise_rng_out));
  m.impl("vdiff_loss", TORCH_BOX(&Ops::loss));
  m.impl("vdiff_loss_backward", TORCH_BOX(&Ops::loss_backward));
}
