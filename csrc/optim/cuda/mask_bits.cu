// SPDX-License-Identifier: Apache-2.0
// CUDA registration of pack_mask, unpack_mask, mask_popcount and mask_prefix.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "optim/cuda/mask_bits_kernel.cuh"
#include "optim/masks_ops.h"

namespace tenfold::cuda {
namespace {

Tensor pack_mask_op(Tensor mask_in) {
  const int64_t n = check_pack_mask(mask_in);
  const Launch launch(mask_in);
  const Tensor mask = as_contiguous(mask_in);
  const Tensor out = new_output(mask, {(n + 7) / 8}, ScalarType::Byte);
  launch_pack(data_as<const uint8_t>(mask), n, data_as<uint8_t>(out), launch.stream);
  launch.check();
  return out;
}

Tensor unpack_mask_op(Tensor packed_in, int64_t n) {
  check_unpack_mask(packed_in, n);
  const Launch launch(packed_in);
  const Tensor packed = as_contiguous(packed_in);
  const Tensor out = new_output(packed, {n}, ScalarType::Bool);
  launch_unpack(data_as<const uint8_t>(packed), n, data_as<uint8_t>(out), launch.stream);
  launch.check();
  return out;
}

Tensor mask_popcount_op(Tensor packed_in) {
  check_packed("mask_popcount", packed_in);
  const Launch launch(packed_in);
  const Tensor packed = as_contiguous(packed_in);
  Tensor out = new_output(packed, {}, ScalarType::Long);
  torch::stable::zero_(out);
  launch_popcount(data_as<const uint8_t>(packed), packed.numel(), data_as<unsigned long long>(out),
                  launch.stream);
  launch.check();
  return out;
}

Tensor mask_prefix_op(Tensor packed_in, int64_t block) {
  const int64_t steps = check_mask_prefix(packed_in, block);
  const Launch launch(packed_in);
  const Tensor packed = as_contiguous(packed_in);
  const Tensor out = new_output(packed, {steps}, ScalarType::Int);
  const Tensor of_blocks = new_output(packed, {prefix_blocks(steps)}, ScalarType::Long);
  launch_prefix(data_as<const uint8_t>(packed), packed.numel(), block / 8, steps,
                data_as<int64_t>(of_blocks), data_as<int32_t>(out), launch.stream);
  launch.check();
  return out;
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("pack_mask", TORCH_BOX(&tenfold::cuda::pack_mask_op));
  m.impl("unpack_mask", TORCH_BOX(&tenfold::cuda::unpack_mask_op));
  m.impl("mask_popcount", TORCH_BOX(&tenfold::cuda::mask_popcount_op));
  m.impl("mask_prefix", TORCH_BOX(&tenfold::cuda::mask_prefix_op));
}
