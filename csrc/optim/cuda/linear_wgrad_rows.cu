// SPDX-License-Identifier: Apache-2.0
// CUDA registration of linear_wgrad_rows.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "optim/cuda/linear_wgrad_rows_kernel.cuh"
#include "optim/wgrad_ops.h"

namespace tenfold::cuda {
namespace {

Tensor linear_wgrad_rows_op(Tensor grad_out, Tensor input, Tensor rows) {
  const WgradCall c = check_linear_wgrad_rows(grad_out, input, rows);
  const Launch launch(c.input);
  const Tensor out = new_output(c.input, {c.num_rows, c.num_in}, c.input.scalar_type());
  const int64_t size = dtype_size(to_dtype(c.input.scalar_type()));
  const auto aligned = [&](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.strides()[0] * size % 16 == 0;
  };
  WgradArgs a{};
  a.grad_out = c.grad_out.data_ptr(), a.grad_stride = c.grad_out.strides()[0];
  a.input = c.input.data_ptr(), a.input_stride = c.input.strides()[0];
  a.tokens = c.tokens, a.num_out = c.num_out, a.num_rows = c.num_rows, a.num_cols = c.num_in;
  a.rows = int_array(rows);
  a.out = out.data_ptr();
  a.grad_vectors = aligned(c.grad_out);
  a.input_vectors = aligned(c.input) && c.num_in * size % 16 == 0;
  a.out_pairs = c.num_in % 2 == 0;
  check_grid("linear_wgrad_rows", wgrad_tiles(a));
  dispatch_dtype(c.input.scalar_type(), "linear_wgrad_rows",
                 [&]<class T>() { launch_linear_wgrad_rows<T>(a, launch.stream); });
  launch.check();
  return out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("linear_wgrad_rows", TORCH_BOX(&tenfold::cuda::linear_wgrad_rows_op));
}
