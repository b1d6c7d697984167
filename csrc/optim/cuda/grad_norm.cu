// SPDX-License-Identifier: Apache-2.0
// CUDA registration of grad_norm.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "optim/cuda/grad_norm_kernel.cuh"
#include "optim/masks_ops.h"

namespace tenfold::cuda {
namespace {

Tensor grad_norm_op(std::vector<Tensor> grads, std::vector<OptTensor> masks,
                    std::optional<double> grad_scale, std::string mask_kind, int64_t block_size,
                    OptTensor grad_scale_tensor) {
  const GradNormArgs a =
      check_grad_norm(grads, masks, grad_scale, mask_kind, block_size, grad_scale_tensor);
  const Tensor& like = a.grads.empty() ? a.scale_tensor.value() : a.grads[0];
  const Launch launch(like);
  const Tensor out = new_output(like, {}, ScalarType::Float);
  int64_t chunks = 0;
  for (const Tensor& g : a.grads) chunks += list_chunks(g.numel());
  check_grid("grad_norm", chunks);
  const Tensor sums = new_output(like, {chunks}, ScalarType::Double);
  const auto tensor = [&](int64_t i) {
    const Tensor& g = a.grads[i];
    return Listed{g.data_ptr(),
                  nullptr,
                  a.masks[i],
                  g.numel(),
                  static_cast<int32_t>(to_dtype(g.scalar_type())),
                  reinterpret_cast<uintptr_t>(g.data_ptr()) % 16 == 0};
  };
  launch_grad_norm(static_cast<int64_t>(a.grads.size()), tensor, data_as<double>(sums), chunks,
                   a.scale.value_or(1.0),
                   a.scale_tensor ? data_as<const float>(*a.scale_tensor) : nullptr,
                   data_as<float>(out), launch.stream);
  launch.check();
  return out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("grad_norm", TORCH_BOX(&tenfold::cuda::grad_norm_op));
}
