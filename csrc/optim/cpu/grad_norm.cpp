// SPDX-License-Identifier: Apache-2.0
// CPU registration of grad_norm.
#include "optim/grad_norm.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "optim/cpu/chunks.h"
#include "optim/masks_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerChunk = 3.0;

Tensor grad_norm_op(std::vector<Tensor> grads, std::vector<OptTensor> masks,
                    std::optional<double> grad_scale, std::string mask_kind, int64_t block_size,
                    OptTensor grad_scale_tensor) {
  const GradNormArgs a =
      check_grad_norm(grads, masks, grad_scale, mask_kind, block_size, grad_scale_tensor);
  const Tensor& like = a.grads.empty() ? a.scale_tensor.value() : a.grads[0];
  const Tensor out = new_output(like, {}, ScalarType::Float);
  const Chunks chunks(a.grads);
  struct Source {
    const void* data;
    Dtype dtype;
  };
  std::vector<Source> sources;
  for (const Tensor& g : a.grads) sources.push_back({g.data_ptr(), to_dtype(g.scalar_type())});
  std::vector<double> sums(chunks.size());
  const int64_t stride = chunks.stride(!masks.empty());
  parallel_for(chunks.size(), kMicrosPerChunk, [&](int64_t begin, int64_t end) {
    int64_t at = begin * stride % chunks.size();
    for (int64_t i = begin; i < end; ++i, at = (at + stride) % chunks.size()) {
      const Chunks::Part part = chunks[at];
      const Source& from = sources[part.tensor];
      sums[at] = TENFOLD_ISA_CALL(grad_square_sum, from.data, from.dtype, a.masks[part.tensor],
                                  part.begin, part.end);
    }
  });
  double sum = 0.0;
  for (const double s : sums) sum += s;
  const double scale = a.scale_tensor ? *data_as<float>(*a.scale_tensor) : a.scale.value_or(1.0);
  *data_as<float>(out) = static_cast<float>(std::sqrt(sum) / std::abs(scale));
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&tenfold::cpu::grad_norm_op));
}
