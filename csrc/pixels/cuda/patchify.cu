// SPDX-License-Identifier: Apache-2.0
// CUDA registration of patchify_u8, patchify_batch, unpatchify and patch_mask. Values are not
// checked: floats outside [0, 1] are taken as they are, numbers of patches are brought into [0, L].
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/dispatch.h"
#include "core/stream.h"
#include "pixels/cuda/patchify_kernel.cuh"
#include "pixels/patchify_ops.h"

namespace tenfold::cuda {
namespace {

void patchify_into(const char* op, const PatchGrid& grid, const PatchBox& box, bool normalize,
                   double eps, const Tensor& out, const OptTensor& targets, cudaStream_t stream) {
  PatchifyArgs a{};
  a.grid = grid, a.grid.box = box;
  a.normalize = normalize, a.eps = eps;
  a.out = out.data_ptr(), a.targets = targets ? targets->data_ptr() : nullptr;
  dispatch_dtype(out.scalar_type(), op, [&]<class T>() { launch_patchify<T>(a, stream); });
}

void run_patchify(const PatchifyCall& c) {
  const Launch launch(c.out);
  const PatchGrid& g = c.image.grid;
  patchify_into("patchify_u8", g, g.box, c.normalize, c.eps, c.out, std::nullopt, launch.stream);
  launch.check();
}

MaskArgs mask_args(const char* op, const Tensor& counts, int64_t length) {
  MaskArgs a{};
  a.num_patches = {counts.data_ptr(), counts.scalar_type() == ScalarType::Long, 1};
  a.rows = counts.numel(), a.length = length;
  check_grid(op, mask_blocks(a.rows, length));
  return a;
}

void run_batch(const PatchifyBatchCall& c) {
  constexpr auto kOp = "patchify_batch";
  const Launch launch(c.patches);
  const PatchGrid& g = c.image.grid;
  MaskArgs masks = mask_args(kOp, c.num_patches, g.length());
  masks.eos[0] = true, masks.eos[1] = c.eos_in_loss;
  masks.out[0] = static_cast<uint8_t*>(c.mask.data_ptr());
  masks.out[1] = static_cast<uint8_t*>(c.loss_mask.data_ptr());
  launch_patch_mask(masks, launch.stream);
  // One launch for both if their values have one order and one dtype.
  const bool together = c.targets_wanted && c.norm_pix &&
                        g.box.stride[0] == c.target_box.stride[0] &&
                        g.box.stride[1] == c.target_box.stride[1] &&
                        c.patches.scalar_type() == c.targets.scalar_type();
  patchify_into(kOp, g, g.box, false, c.eps, c.patches,
                together ? OptTensor(c.targets) : OptTensor(), launch.stream);
  if (c.targets_wanted && !together)
    patchify_into(kOp, g, c.target_box, c.norm_pix, c.eps, c.targets, std::nullopt, launch.stream);
  launch.check();
}

void run_unpatchify(const UnpatchifyCall& c) {
  const Launch launch(c.out);
  UnpatchifyArgs a{};
  a.grid = c.grid, a.rows = c.rows;
  a.mean = c.mean ? data_as<float>(*c.mean) : nullptr;
  a.deviation = c.std_ ? data_as<float>(*c.std_) : nullptr;
  dispatch_dtype(c.patches.scalar_type(), "unpatchify",
                 [&]<class T>() { launch_unpatchify<T>(a, launch.stream); });
  launch.check();
}

void run_mask(const MaskCall& c) {
  const Launch launch(c.out);
  MaskArgs a = mask_args("patch_mask", c.num_patches, c.length);
  a.eos[0] = c.eos, a.out[0] = static_cast<uint8_t*>(c.out.data_ptr());
  launch_patch_mask(a, launch.stream);
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::PatchifyOps<&tenfold::cuda::run_patchify, &tenfold::cuda::run_batch,
                                   &tenfold::cuda::run_unpatchify, &tenfold::cuda::run_mask>;
  m.impl("patchify_u8", TORCH_BOX(&Ops::patchify));
  m.impl("patchify_u8_", TORCH_BOX(&Ops::patchify_out));
  m.impl("patchify_batch", TORCH_BOX(&Ops::batch));
  m.impl("unpatchify", TORCH_BOX(&Ops::unpatchify));
  m.impl("patch_mask", TORCH_BOX(&Ops::mask));
}
