// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `pixels`, for ctypes. The launch code is the kernels'
// own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "pixels/cuda/patch_mse_kernel.cuh"
#include "pixels/cuda/patchify_kernel.cuh"

namespace {

constexpr int kGrid = 13;  // numbers

// n: pixel images rows cols image_step row_step col_step size[3] stride[3]
PatchGrid grid_of(const void* data, const int64_t* n) {
  return {data,
          static_cast<Pixel>(n[0]),
          n[1],
          n[2],
          n[3],
          n[4],
          n[5],
          n[6],
          {{n[7], n[8], n[9]}, {n[10], n[11], n[12]}}};
}

}  // namespace

// targets: or null. n: grid[13] dtype normalize
API void emu_patchify(const void* image, void* out, void* targets, const int64_t* n, double eps) {
  PatchifyArgs a{};
  a.grid = grid_of(image, n), a.normalize = n[kGrid + 1] != 0, a.eps = eps;
  a.out = out, a.targets = targets;
  with_dtype(n[kGrid], [&]<class T>() { launch_patchify<T>(a, nullptr); });
}

// mean, deviation: or null. n: grid[13] dtype image_step row_step
API void emu_unpatchify(void* image, void* patches, const float* mean, const float* deviation,
                        const int64_t* n) {
  UnpatchifyArgs a{};
  a.grid = grid_of(image, n), a.rows = {patches, n[kGrid + 1], n[kGrid + 2]};
  a.mean = mean, a.deviation = deviation;
  with_dtype(n[kGrid], [&]<class T>() { launch_unpatchify<T>(a, nullptr); });
}

// second: or null. n: rows length eos second_eos wide
API void emu_patch_mask(const void* num_patches, uint8_t* out, uint8_t* second, const int64_t* n) {
  MaskArgs a{};
  a.num_patches = ints(num_patches, n[4]), a.rows = n[0], a.length = n[1];
  a.eos[0] = n[2] != 0, a.eos[1] = n[3] != 0, a.out[0] = out, a.out[1] = second;
  launch_patch_mask(a, nullptr);
}

// out: grad per_patch loss denom, or null. n: grid[13] dtype, steps of pred and of grad, kind
// normalize shift made
API void emu_mse(void* pred, const void* image, const void* weights, const float* denom,
                 const float* grad_loss, void* const* out, const int64_t* n, double eps) {
  Memory memory;
  const Room room = memory.room();
  MseArgs a{};
  const int64_t* const rest = n + kGrid + 1;
  a.m.grid = grid_of(image, n), a.m.pred = {pred, rest[0], rest[1]};
  a.m.grad = {out[0], rest[2], rest[3]};
  a.m.weights = {weights, static_cast<WeightKind>(rest[4])};
  a.m.normalize = rest[5] != 0, a.m.shift = rest[6], a.m.eps = eps;
  a.m.per_patch = static_cast<float*>(out[1]);
  a.made = rest[7] != 0, a.denom = denom, a.grad_loss = grad_loss;
  a.loss = static_cast<float*>(out[2]), a.denom_out = static_cast<float*>(out[3]);
  if (denom == nullptr) a.of_weights = static_cast<double*>(room(8 * kWeightBlocks));
  if (a.loss != nullptr) a.of_errors = static_cast<double*>(room(8 * mse_blocks(a.m)));
  with_dtype(n[kGrid], [&]<class T>() { launch_mse<T>(a, nullptr); });
}
