// SPDX-License-Identifier: Apache-2.0
// CUDA registration of masked_copy_.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "optim/cuda/masked_copy_kernel.cuh"
#include "optim/masks_ops.h"

namespace tenfold::cuda {
namespace {

void masked_copy_op(std::vector<Tensor> dst, std::vector<Tensor> src, std::vector<OptTensor> masks,
                    std::string mask_kind, int64_t block_size) {
  const std::vector<Mask> mask = check_masked_copy(dst, src, masks, mask_kind, block_size);
  if (dst.empty()) return;
  const Launch launch(dst[0]);
  std::vector<Listed> copied[4], rounded[3];  // by log2 of the element's size; by dtype
  int64_t chunks = 0;
  for (size_t i = 0; i < dst.size(); ++i) {
    src[i] = in_order_of(dst[i], src[i]);
    const void* from = src[i].data_ptr();
    void* to = dst[i].data_ptr();
    const bool aligned =
        (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
    const Listed t{
        from,   to, mask[i], dst[i].numel(), static_cast<int32_t>(to_dtype(src[i].scalar_type())),
        aligned};
    chunks += list_chunks(t.numel);
    if (src[i].scalar_type() == dst[i].scalar_type()) {
      const auto size = dst[i].element_size();
      copied[size == 1 ? 0 : size == 2 ? 1 : size == 4 ? 2 : 3].push_back(t);
    } else {
      rounded[static_cast<int>(to_dtype(dst[i].scalar_type()))].push_back(t);
    }
  }
  check_grid("masked_copy_", chunks);
  const auto of = [](const std::vector<Listed>& list) {
    return [&list](int64_t i) { return list[i]; };
  };
  for (int log = 0; log < 4; ++log)
    launch_masked_copy(static_cast<int64_t>(copied[log].size()), of(copied[log]), int64_t{1} << log,
                       launch.stream);
  const auto size = [](const auto& list) { return static_cast<int64_t>(list.size()); };
  launch_masked_round<float>(size(rounded[0]), of(rounded[0]), launch.stream);
  launch_masked_round<bf16_t>(size(rounded[1]), of(rounded[1]), launch.stream);
  launch_masked_round<fp16_t>(size(rounded[2]), of(rounded[2]), launch.stream);
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  m.impl("masked_copy_", TORCH_BOX(&tenfold::cuda::masked_copy_op));
}
