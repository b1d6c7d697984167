// SPDX-License-Identifier: Apache-2.0
// CUDA registration of mask_topk and mask_random.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "optim/cuda/mask_topk_kernel.cuh"
#include "optim/masks_ops.h"

namespace tenfold::cuda {
namespace {

Tensor masked_largest(const char* op, const Tensor& like, const KeySource& source, int64_t n,
                      int64_t k) {
  const Launch launch(like);
  check_grid(op, topk_tiles(n));
  const Tensor out = new_output(like, {(n + 7) / 8}, ScalarType::Byte);
  const Tensor state =
      new_output(like, {static_cast<int64_t>(sizeof(RadixState) / 8)}, ScalarType::Long);
  const Tensor ties = new_output(like, {topk_tiles(n)}, ScalarType::Long);
  launch_mask_topk({source, n, k, static_cast<RadixState*>(state.data_ptr()),
                    data_as<int64_t>(ties), data_as<uint8_t>(out)},
                   launch.stream);
  launch.check();
  return out;
}

Tensor mask_topk_op(Tensor score_in, double fraction) {
  const int64_t k = check_mask_topk(score_in, fraction);
  const Launch launch(score_in);
  const Tensor score = as_contiguous(score_in);
  const KeySource source{score.data_ptr(), to_dtype(score.scalar_type()), 0, 0, 0, 0};
  return masked_largest("mask_topk", score, source, score.numel(), k);
}

Tensor mask_random_op(Tensor like, int64_t n, double fraction, int64_t seed, int64_t stream) {
  const int64_t k = check_mask_random(n, fraction);
  return masked_largest("mask_random", like, random_source(seed, stream), n, k);
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("mask_topk", TORCH_BOX(&tenfold::cuda::mask_topk_op));
  m.impl("mask_random", TORCH_BOX(&tenfold::cuda::mask_random_op));
}
