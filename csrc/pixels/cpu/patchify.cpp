// SPDX-License-Identifier: Apache-2.0
// CPU registration of patchify_u8, patchify_batch, unpatchify and patch_mask.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "pixels/cpu/patch_kernels.h"
#include "pixels/patchify_ops.h"

namespace tenfold {
namespace {

// One thread's share; memory sets it.
constexpr double kMicrosPerByte = 1e-4;
constexpr int64_t kStreamFrom = int64_t{4} << 20;  // bytes of an output: more than stays cached

double micros_per_patch(const PatchGrid& g, int64_t bytes_per_value) {
  return 0.02 + kMicrosPerByte * static_cast<double>(g.values() * bytes_per_value);
}

// f(begin, end, work) over all patches.
template <class F>
void for_patches(const PatchGrid& g, int64_t bytes_per_value, const F& f) {
  parallel_for(g.images * g.length(), micros_per_patch(g, bytes_per_value),
               [&](int64_t begin, int64_t end) {
                 const Scratch work(patch_work(g.values()));
                 f(begin, end, work.data());
               });
}

}  // namespace

bool in_unit_range(const PatchGrid& grid) {
  std::atomic<bool> inside{true};
  for_patches(grid, pixel_size(grid.pixel), [&](int64_t begin, int64_t end, void* work) {
    if (!TENFOLD_ISA_CALL(patches_in_unit_range, grid, begin, end, work)) inside = false;
  });
  return inside;
}

namespace cpu {
namespace {

PatchOut out_of(const Tensor& t, const PatchBox& box, bool normalize, double eps) {
  const Dtype dtype = to_dtype(t.scalar_type());
  return {t.data_ptr(), dtype, box, normalize, eps, t.numel() * dtype_size(dtype) >= kStreamFrom};
}

void write_masks(const Tensor& counts, int64_t length, bool eos, const Tensor& to) {
  const bool wide = counts.scalar_type() == ScalarType::Long;
  auto* const out = static_cast<uint8_t*>(to.data_ptr());
  const int64_t rows = counts.numel();
  parallel_for(rows, 0.01 + 5e-5 * static_cast<double>(length), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = wide ? data_as<int64_t>(counts)[i] : data_as<int32_t>(counts)[i];
      const int64_t there = patches_there(n, eos, length);
      std::memset(out + i * length, 1, static_cast<size_t>(there));
      std::memset(out + i * length + there, 0, static_cast<size_t>(length - there));
    }
  });
}

void run_patchify(const PatchifyCall& c) {
  const PatchGrid& g = c.image.grid;
  const PatchOut out = out_of(c.out, g.box, c.normalize, c.eps);
  for_patches(g, pixel_size(g.pixel) + dtype_size(out.dtype),
              [&](int64_t begin, int64_t end, void* work) {
                TENFOLD_ISA_CALL(patchify_some, g, &out, 1, begin, end, work);
              });
}

void run_batch(const PatchifyBatchCall& c) {
  const PatchGrid& g = c.image.grid;
  const PatchOut outs[2] = {out_of(c.patches, g.box, false, 0.0),
                            out_of(c.targets, c.target_box, c.norm_pix, c.eps)};
  const int count = c.targets_wanted ? 2 : 1;
  for_patches(g, 4 * count + 1, [&](int64_t begin, int64_t end, void* work) {
    TENFOLD_ISA_CALL(patchify_some, g, outs, count, begin, end, work);
  });
  write_masks(c.num_patches, g.length(), true, c.mask);
  write_masks(c.num_patches, g.length(), c.eos_in_loss, c.loss_mask);
}

void run_unpatchify(const UnpatchifyCall& c) {
  const Dtype dtype = to_dtype(c.patches.scalar_type());
  const PatchIn in{c.rows, dtype, c.mean ? data_as<float>(*c.mean) : nullptr,
                   c.std_ ? data_as<float>(*c.std_) : nullptr};
  for_patches(c.grid, pixel_size(c.grid.pixel) + dtype_size(dtype),
              [&](int64_t begin, int64_t end, void* work) {
                TENFOLD_ISA_CALL(unpatchify_some, c.grid, in, begin, end, work);
              });
}

void run_mask(const MaskCall& c) {
  write_masks(c.num_patches, c.length, c.eos, c.out);
}

}  // namespace
}  // namespace cpu
}  // namespace tenfold

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::PatchifyOps<&tenfold::cpu::run_patchify, &tenfold::cpu::run_batch,
                                   &tenfold::cpu::run_unpatchify, &tenfold::cpu::run_mask>;
  m.impl("patchify_u8", TORCH_BOX(&Ops::patchify));
  m.impl("patchify_u8_", TORCH_BOX(&Ops::patchify_out));
  m.impl("patchify_batch", TORCH_BOX(&Ops::batch));
  m.impl("unpatchify", TORCH_BOX(&Ops::unpatchify));
  m.impl("patch_mask", TORCH_BOX(&Ops::mask));
}
