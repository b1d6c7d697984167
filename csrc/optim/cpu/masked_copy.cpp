// SPDX-License-Identifier: Apache-2.0
// CPU registration of masked_copy_.
#include "optim/masked_copy.h"

#include <torch/csrc/stable/library.h>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "optim/cpu/chunks.h"
#include "optim/masks_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerChunk = 6.0;
constexpr int64_t kStreamFrom = int64_t{16} << 20;  // bytes of all outputs: more than stays cached

void masked_copy_op(std::vector<Tensor> dst, std::vector<Tensor> src, std::vector<OptTensor> masks,
                    std::string mask_kind, int64_t block_size) {
  const std::vector<Mask> mask = check_masked_copy(dst, src, masks, mask_kind, block_size);
  int64_t bytes = 0;
  for (size_t i = 0; i < dst.size(); ++i) {
    src[i] = in_order_of(dst[i], src[i]);
    bytes += dst[i].numel() * static_cast<int64_t>(dst[i].element_size());
  }
  struct Pair {
    void* to;
    const void* from;
    int64_t size;
    bool same_dtype;
    Dtype to_type, from_type;
  };
  std::vector<Pair> pairs;
  for (size_t i = 0; i < dst.size(); ++i)
    pairs.push_back({dst[i].data_ptr(), src[i].data_ptr(),
                     static_cast<int64_t>(dst[i].element_size()),
                     dst[i].scalar_type() == src[i].scalar_type(), to_dtype(dst[i].scalar_type()),
                     to_dtype(src[i].scalar_type())});
  const Chunks chunks(dst);
  const int64_t stride = chunks.stride(!masks.empty());
  parallel_for(chunks.size(), kMicrosPerChunk, [&](int64_t begin, int64_t end) {
    int64_t at = begin * stride % chunks.size();
    for (int64_t i = begin; i < end; ++i, at = (at + stride) % chunks.size()) {
      const Chunks::Part part = chunks[at];
      const Pair& p = pairs[part.tensor];
      if (p.same_dtype) {
        TENFOLD_ISA_CALL(masked_copy_bits, p.to, p.from, p.size, mask[part.tensor], part.begin,
                         part.end, bytes >= kStreamFrom);
      } else {
        TENFOLD_ISA_CALL(masked_copy_rounded, p.to, p.to_type, p.from, p.from_type,
                         mask[part.tensor], part.begin, part.end);
      }
    }
  });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("masked_copy_", TORCH_BOX(&tenfold::cpu::masked_copy_op));
}
