// SPDX-License-Identifier: Apache-2.0
// CUDA registration of outer_dot.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "influence/cuda/outer_dot_kernel.cuh"
#include "influence/outer_dot_ops.h"

namespace tenfold::cuda {
namespace {

// Rows of `width` elements that can be read in vectors of 16 bytes.
bool has_vectors(const Tensor& t, int64_t width) {
  const int64_t size = dtype_size(to_dtype(t.scalar_type()));
  const TokenRows rows = token_rows(t);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.example * size % 16 == 0 &&
         rows.token * size % 16 == 0 && width * size % 16 == 0;
}

Tensor outer_dot_op(Tensor j, Tensor x, Tensor j2, Tensor x2, bool paired) {
  constexpr auto kOp = "outer_dot";
  const OuterDotCall c = check_outer_dot(j, x, j2, x2, paired);
  const Launch launch(j);
  const Tensor out = new_scores(c);
  const OuterDotArgs a{token_rows(c.j),
                       token_rows(c.x),
                       token_rows(c.j2),
                       token_rows(c.x2),
                       c.n,
                       c.t,
                       c.m,
                       c.s,
                       c.v,
                       c.d,
                       c.paired,
                       has_vectors(c.j, c.v) && has_vectors(c.j2, c.v),
                       has_vectors(c.x, c.d) && has_vectors(c.x2, c.d),
                       data_as<float>(out)};
  check_grid(kOp, dot_blocks(a));
  dispatch_dtype(c.j.scalar_type(), kOp, [&]<class T>() { launch_outer_dot<T>(a, launch.stream); });
  launch.check();
  return out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("outer_dot", TORCH_BOX(&tenfold::cuda::outer_dot_op));
}
