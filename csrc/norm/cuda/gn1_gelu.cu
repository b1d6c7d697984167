// SPDX-License-Identifier: Apache-2.0
// CUDA registration of gn1_gelu.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "norm/cuda/gn1_gelu_kernel.cuh"
#include "norm/gn1_gelu_ops.h"

namespace tenfold::cuda {
namespace {

void run_gn1(const Gn1Call& c, const Tensor* mean, const Tensor* rstd) {
  constexpr auto kOp = "gn1_gelu";
  const Launch launch(c.x);
  DeviceMemory memory(c.x);
  const Room room = memory.room();
  Gn1Args a{};
  a.x = c.x.data_ptr(), a.residual = c.residual ? c.residual->data_ptr() : nullptr;
  a.weight = c.weight.data_ptr(), a.bias = c.bias.data_ptr(), a.y = c.y.data_ptr();
  a.weight_dtype = to_dtype(c.weight.scalar_type());
  a.mean = mean != nullptr ? data_as<float>(*mean) : nullptr;
  a.rstd = rstd != nullptr ? data_as<float>(*rstd) : nullptr;
  a.eps = c.eps, a.samples = c.samples(), a.channels = c.channels(), a.length = c.length();
  const int64_t each = a.channels * a.length, blocks = a.samples * gn1_parts(each);
  check_grid(kOp, blocks);
  a.parts = static_cast<Moments*>(room((blocks + 1) * static_cast<int64_t>(sizeof(Moments))));
  a.of = static_cast<Gn1Sample*>(room((a.samples + 1) * static_cast<int64_t>(sizeof(Gn1Sample))));
  dispatch_dtype(c.x.scalar_type(), kOp, [&]<class T>() {
    check_grid(kOp, gn1_apply_blocks<T>(a.samples, each));
    launch_gn1_gelu<T>(a, launch.stream);
  });
  launch.check();
}

void run_gn1_backward(const Gn1GradCall& c) {
  constexpr auto kOp = "gn1_gelu_backward";
  const Launch launch(c.x);
  DeviceMemory memory(c.x);
  const Room room = memory.room();
  Gn1GradArgs a{};
  a.dy = c.dy.data_ptr(), a.x = c.x.data_ptr(), a.weight = c.weight.data_ptr();
  a.bias = c.bias.data_ptr(), a.mean = data_as<float>(c.mean), a.rstd = data_as<float>(c.rstd);
  a.weight_dtype = to_dtype(c.weight.scalar_type());
  a.dx = c.dx.data_ptr(), a.dweight = c.dweight.data_ptr(), a.dbias = c.dbias.data_ptr();
  a.samples = c.samples(), a.channels = c.channels(), a.length = c.length();
  const int64_t parts = a.samples * a.channels * gn1_pieces(a.length);
  check_grid(kOp, parts);
  a.parts = static_cast<Gn1Sums*>(room((parts + 1) * static_cast<int64_t>(sizeof(Gn1Sums))));
  a.means = static_cast<float*>(room(8 * a.samples + 8));
  dispatch_dtype(c.x.scalar_type(), kOp, [&]<class T>() {
    check_grid(kOp, gn1_apply_blocks<T>(a.samples, a.channels * a.length));
    launch_gn1_gelu_grad<T>(a, launch.stream);
  });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::Gn1Ops<&tenfold::cuda::run_gn1, &tenfold::cuda::run_gn1_backward>;
  m.impl("gn1_gelu", TORCH_BOX(&Ops::forward));
  m.impl("gn1_gelu_", TORCH_BOX(&Ops::forward_out));
  m.impl("gn1_gelu_backward", TORCH_BOX(&Ops::backward));
}
