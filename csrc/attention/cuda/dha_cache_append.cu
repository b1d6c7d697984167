// SPDX-License-Identifier: Apache-2.0
// CUDA registration of dha_cache_append_.
#include <torch/csrc/stable/library.h>

#include "attention/cuda/dha_cache_append_kernel.cuh"
#include "attention/decode_ops.h"
#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"

namespace tenfold::cuda {
namespace {

void dha_cache_append_op(Tensor k_cache, Tensor v_cache, Tensor k_in, Tensor v_in, Tensor slots,
                         bool paged, OptTensor cos_in, OptTensor sin_in) {
  constexpr auto op = "dha_cache_append_";
  check_dha_append(k_cache, v_cache, k_in, v_in, slots, {paged, cos_in, sin_in});
  const Launch launch(k_cache);
  const Tensor k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const OptTensor cos = cos_in ? OptTensor(with_contiguous_rows(*cos_in)) : OptTensor();
  const OptTensor sin = sin_in ? OptTensor(with_contiguous_rows(*sin_in)) : OptTensor();
  DhaAppendOnDevice p{};
  static_cast<DhaAppendParams&>(p) =
      check_dha_append(k_cache, v_cache, k, v, slots, {paged, cos, sin});
  p.k_data = k.data_ptr(), p.v_data = v.data_ptr();
  p.k_to = k_cache.data_ptr(), p.v_to = v_cache.data_ptr();
  p.cos = cos ? cos->data_ptr() : nullptr, p.sin = sin ? sin->data_ptr() : nullptr;
  p.slots = slots.data_ptr(), p.slots_wide = slots.scalar_type() == ScalarType::Long;
  p.vectors = append_vectors(p);
  check_grid(op, append_blocks(p));
  dispatch_dtype(k.scalar_type(), op, [&]<class T>() { launch_dha_append<T>(p, launch.stream); });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("dha_cache_append_", TORCH_BOX(&tenfold::cuda::dha_cache_append_op));
}
