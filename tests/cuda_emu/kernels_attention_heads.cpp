// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated head operations, for ctypes. The launch code is the kernels' own.
#define TENFOLD_CUDA_EMU
#include "attention/cuda/fuse_heads_kernel.cuh"
#include "attention/cuda/fusion_mse_kernel.cuh"
#include "attention/cuda/head_cka_kernel.cuh"
#include "entry.h"  // after the kernels

namespace {

HeadRows by_groups(void* w, int64_t dims, int64_t length) {
  return {w, 0, dims * length, length, true};
}

HeadRows in_order(void* x, int64_t heads, int64_t dims, int64_t length) {
  return {x, heads * dims * length, dims * length, length, false};
}

}  // namespace

// n: dtype N g d m groups_wide kind (0: fuse, 1: collapse, 2: dw); all contiguous
API void emu_mix_heads(void* from, const float* omega, const void* groups, void* to,
                       const int64_t* n) {
  const int64_t g = n[2], d = n[3], m = n[4], size = n[0] == 0 ? 4 : 2;
  MixArgs a{};
  a.from = n[6] == 2 ? in_order(from, g, d, m) : by_groups(from, d, m);
  a.to = n[6] == 2 ? by_groups(to, d, m) : in_order(to, n[6] == 1 ? 1 : g, d, m);
  a.groups = {groups, n[5] != 0, 1};
  a.num_groups = n[1], a.num_in = g, a.num_out = n[6] == 1 ? 1 : g, a.dims = d, a.length = m;
  a.heads = n[1] * g;
  a.omega = omega;
  a.coef_in = n[6] == 2 ? g * d : d;
  a.coef_out = n[6] == 2 ? d : g * d;
  a.mean_heads = n[6] == 1 ? g : 0;
  a.vectors = aligned_rows(a.from, m, size) && aligned_rows(a.to, m, size);
  with_dtype(n[0], [&]<class T>() { launch_mix_heads<T>(a, nullptr); });
}

// n: dtype N g d m groups_wide; dw may be null
API void emu_fuse_backward(void* dout, void* w, const float* omega, const void* groups, void* dw,
                           float* domega, const int64_t* n) {
  const int64_t g = n[2], d = n[3], m = n[4], size = n[0] == 0 ? 4 : 2;
  FuseBackwardArgs a{};
  a.dout = in_order(dout, g, d, m);
  a.w = by_groups(w, d, m);
  if (dw != nullptr) a.dw = by_groups(dw, d, m);
  a.groups = {groups, n[5] != 0, 1};
  a.num_groups = n[1], a.size = g, a.dims = d, a.length = m, a.heads = n[1] * g;
  a.omega = omega, a.domega = domega;
  a.vectors =
      aligned_rows(a.dout, m, size) && aligned_rows(a.w, m, size) && aligned_rows(a.dw, m, size);
  with_dtype(n[0], [&]<class T>() { launch_fuse_backward<T>(a, nullptr); });
}

// n: N g d dout_stride; dout null: the forward
API void emu_fusion_mse(const float* omega, const float* dout, float* out, const int64_t* n) {
  FusionMseArgs a{};
  a.omega = omega, a.dout = dout, a.dout_stride = n[3];
  a.num_groups = n[0], a.size = n[1], a.dims = n[2];
  a.scale = fusion_mse_scale(a.size, a.dims);
  std::vector<float> partial(a.num_groups * a.size);
  a.partial = partial.data();
  if (dout == nullptr) {
    a.mse = out;
    launch_fusion_mse(a, nullptr);
  } else {
    a.domega = out;
    launch_fusion_mse_backward(a, nullptr);
  }
}

// n: dtype H d m head_stride row_stride center
API void emu_head_cka(const void* w, float* cka, const int64_t* n) {
  CkaArgs a{};
  a.w = w, a.heads = n[1], a.dims = n[2], a.length = n[3];
  a.head_stride = n[4], a.row_stride = n[5];
  a.cuts = cka_cuts(a.dims);
  std::vector<double> partial(cka_tiles(a.heads, a.dims));
  std::vector<float> mean(a.heads * a.dims + 1);
  a.partial = partial.data(), a.cka = cka;
  a.mean = n[6] != 0 ? mean.data() : nullptr;
  with_dtype(n[0], [&]<class T>() { launch_head_cka<T>(a, nullptr); });
}
