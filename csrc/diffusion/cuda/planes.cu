// SPDX-License-Identifier: Apache-2.0
// CUDA registration of the parts of conv1d_planes.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "diffusion/cuda/planes_kernel.cuh"
#include "diffusion/planes_ops.h"

namespace tenfold::cuda {
namespace {

void run_planes_add(const PlanesAddCall& c) {
  constexpr auto kOp = "planes_add_";
  const Launch launch(c.y);
  PlanesAddArgs a{};
  a.y = c.y.data_ptr(), a.taps = data_as<float>(c.taps);
  a.bias = c.bias ? c.bias->data_ptr() : nullptr;
  a.rows = c.rows(), a.channels = c.channels(), a.length = c.length(), a.size = c.size();
  a.edges_only = c.edges_only;
  dispatch_dtype(c.y.scalar_type(), kOp, [&]<class T>() {
    check_grid(kOp, planes_blocks<T>(a));
    launch_planes_add<T>(a, launch.stream);
  });
  launch.check();
}

void run_planes_sums(const PlanesSumsCall& c) {
  constexpr auto kOp = "planes_sums";
  const Launch launch(c.grad);
  check_grid(kOp, c.rows());
  const PlanesSumsArgs a{c.grad.data_ptr(), data_as<float>(c.sums), c.rows(), c.length(), c.size()};
  dispatch_dtype(c.grad.scalar_type(), kOp,
                 [&]<class T>() { launch_planes_sums<T>(a, launch.stream); });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::PlanesOps<&tenfold::cuda::run_planes_add, &tenfold::cuda::run_planes_sums>;
  m.impl("planes_check", TORCH_BOX(&Ops::check));
  m.impl("planes_add_", TORCH_BOX(&Ops::add));
  m.impl("planes_sums", TORCH_BOX(&Ops::sums));
}
