// SPDX-License-Identifier: Apache-2.0
// CUDA registration of head_cka.
#include <torch/csrc/stable/library.h>

#include "attention/cuda/head_cka_kernel.cuh"
#include "attention/cuda/heads_impl.h"
#include "core/dispatch.h"

namespace tenfold::cuda {
namespace {

Tensor head_cka_op(Tensor w_in, bool center) {
  constexpr auto op = "head_cka";
  check_head_cka(op, w_in);
  const Launch launch(w_in);
  const Tensor w = with_contiguous_rows(w_in);
  CkaArgs a{};
  a.w = w.data_ptr(), a.head_stride = w.strides()[0], a.row_stride = w.strides()[1];
  a.heads = w.sizes()[0], a.dims = w.sizes()[1], a.length = w.sizes()[2];
  a.cuts = cka_cuts(a.dims);
  const int64_t tiles = cka_tiles(a.heads, a.dims);
  check_blocks(op, tiles);
  const Tensor out = new_output(w, {a.heads, a.heads}, ScalarType::Float);
  const Tensor partial = new_output(w, {tiles}, ScalarType::Double);
  const Tensor mean = new_output(w, {center ? a.heads * a.dims : 0}, ScalarType::Float);
  a.cka = data_as<float>(out), a.partial = data_as<double>(partial);
  a.mean = center ? data_as<float>(mean) : nullptr;
  dispatch_dtype(w.scalar_type(), op, [&]<class T>() { launch_head_cka<T>(a, launch.stream); });
  launch.check();
  return out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("head_cka", TORCH_BOX(&tenfold::cuda::head_cka_op));
}
