// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `diffusion`, for ctypes. The launch code is the
// kernels' own.
#define TENFOLD_CUDA_EMU
#include "diffusion/cuda/planes_kernel.cuh"
#include "diffusion/cuda/resample_kernel.cuh"
#include "diffusion/cuda/vdiff_kernel.cuh"
#include "entry.h"  // after the kernels

namespace {

// (pointer, is float64, elements from one to the next)
PerSample numbers(const void* data, const int64_t* n) {
  return {data, n[0] != 0, n[1]};
}

template <class F>
void with_kinds(int64_t dtype, int64_t v_dtype, F f) {
  with_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 4) {
      with_dtype(v_dtype, [&]<class V>() { f.template operator()<T, V>(); });
    } else {
      f.template operator()<T, T>();
    }
  });
}

}  // namespace

// in: x0 noise t; out: z v. n: dtype samples each seed offset, numbers of t
API void emu_vdiff_noise(const void* const* in, void* const* out, const int64_t* n) {
  NoiseArgs a{};
  a.x0 = in[0], a.noise = in[1], a.z = out[0], a.v = out[1];
  a.samples = n[1], a.each = n[2], a.t = numbers(in[2], n + 5);
  a.stream = {static_cast<uint64_t>(n[3]), static_cast<uint64_t>(n[4])};
  with_dtype(n[0], [&]<class T>() { launch_vdiff_noise<T>(a, nullptr); });
}

// in: v_hat x0 noise t grad_loss; out: loss, grad. n: dtype v_dtype samples each, numbers of t
API void emu_vdiff_loss(const void* const* in, void* const* out, const int64_t* n) {
  Memory memory;
  LossArgs a{};
  a.v_hat = in[0], a.x0 = in[1], a.noise = in[2], a.t = numbers(in[3], n + 4);
  a.grad_loss = static_cast<const float*>(in[4]), a.loss = static_cast<float*>(out[0]);
  a.grad = out[1], a.samples = n[2], a.each = n[3];
  with_kinds(n[0], n[1], [&]<class T, class V>() {
    a.parts = static_cast<double*>(memory.room()(8 * a.samples * vdiff_blocks<T, V>(a.each)));
    launch_vdiff_loss<T, V>(a, nullptr);
  });
}

// in: z v v_uncond noise t u guidance; out: z_next x0_hat. n: dtype v_dtype samples each clips
// rederives plus_plus, numbers of t, u and guidance. options: eta clip
API void emu_vdiff_step(const void* const* in, void* const* out, const int64_t* n,
                        const double* options) {
  StepArgs a{};
  a.z = in[0], a.v = in[1], a.v_uncond = in[2], a.noise = in[3];
  a.t = numbers(in[4], n + 7), a.u = numbers(in[5], n + 9), a.guidance = numbers(in[6], n + 11);
  a.z_next = out[0], a.x0_hat = out[1], a.samples = n[2], a.each = n[3];
  a.options = {options[0], options[1], n[4] != 0, n[5] != 0, n[6] != 0};
  with_kinds(n[0], n[1], [&]<class T, class V>() { launch_vdiff_step<T, V>(a, nullptr); });
}

// in: x skip; out: y. n: dtype kind batch channels skipped length outputs, steps of x, skip and y
API void emu_fir(const void* const* in, void* const* out, const int64_t* n) {
  FirArgs a{};
  a.kind = static_cast<Fir>(n[1]), a.batch = n[2], a.channels = n[3], a.skipped = n[4];
  a.length = n[5], a.outputs = n[6];
  a.x = {const_cast<void*>(in[0]), n[7], n[8]};
  a.skip = {const_cast<void*>(in[1]), n[9], n[10]};
  a.y = {out[0], n[11], n[12]};
  with_dtype(n[0], [&]<class T>() { launch_fir<T>(a, nullptr); });
}

// n: dtype rows channels length size edges_only
API void emu_planes_add(void* y, const float* taps, const void* bias, const int64_t* n) {
  PlanesAddArgs a{y, taps, bias, n[1], n[2], n[3], n[4], n[5] != 0, false};
  with_dtype(n[0], [&]<class T>() { launch_planes_add<T>(a, nullptr); });
}

// n: dtype rows length size
API void emu_planes_sums(const void* grad, float* sums, const int64_t* n) {
  const PlanesSumsArgs a{grad, sums, n[1], n[2], n[3]};
  with_dtype(n[0], [&]<class T>() { launch_planes_sums<T>(a, nullptr); });
}
