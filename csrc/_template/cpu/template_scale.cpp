// SPDX-License-Identifier: Apache-2.0
// CPU registration: tensors -> raw pointers, threads, ISA pick.
#include "_template/template_scale.h"

#include <torch/csrc/stable/library.h>

#include "_template/ops.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // elements per task item: a few microseconds

Tensor template_scale_op(Tensor x_in, double scale) {
  check_template_scale(x_in, scale);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor y = torch::stable::empty_like(x);
  const Dtype dtype = to_dtype(x.scalar_type());
  const int64_t n = x.numel(), size = dtype_size(dtype);
  parallel_for((n + kBlock - 1) / kBlock, 0.5, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = end * kBlock < n ? end * kBlock : n;
    TENFOLD_ISA_CALL(template_scale, data_as<char>(x) + first * size,
                     data_as<char>(y) + first * size, dtype, last - first,
                     static_cast<float>(scale));
  });
  return y;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("template_scale", TORCH_BOX(&tenfold::cpu::template_scale_op));
}
