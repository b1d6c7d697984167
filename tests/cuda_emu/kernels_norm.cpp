// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `norm`, for ctypes. The launch code is the kernels'
// own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "norm/cuda/gated_act_kernel.cuh"
#include "norm/cuda/gn1_gelu_kernel.cuh"
#include "norm/cuda/rms_norm_kernel.cuh"

namespace {

const Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

}  // namespace

// in: x residual weight, out: y sum rstd, or null. n: dtypes of x, weight and y, rounds rows cols
// x_stride residual_stride y_stride sum_stride
API void emu_rms_norm(const void* const* in, void* const* out, const int64_t* n,
                      const double* eps) {
  RmsArgs a{};
  RmsRows& r = a.r;
  r.x = in[0], r.residual = in[1], r.weight = in[2];
  r.y = out[0], r.sum = out[1], r.rstd = static_cast<float*>(out[2]);
  r.x_dtype = kDtypes[n[0]], r.weight_dtype = kDtypes[n[1]], r.y_dtype = kDtypes[n[2]];
  r.rounds = n[3] != 0, a.rows = n[4], r.cols = n[5], r.eps = static_cast<float>(*eps);
  r.x_stride = n[6], r.residual_stride = n[7], r.y_stride = n[8], r.sum_stride = n[9];
  launch_rms_norm(a, nullptr);
}

// in: dy dsum h weight rstd, out: dx dw, or null. n: dtypes of h, weight and dy, rows cols
// dy_stride dsum_stride h_stride
API void emu_rms_norm_grad(const void* const* in, void* const* out, const int64_t* n) {
  Memory memory;
  RmsGradArgs a{};
  RmsGradRows& r = a.r;
  r.dy = in[0], r.dsum = in[1], r.h = in[2], r.weight = in[3];
  r.rstd = static_cast<const float*>(in[4]), r.dx = out[0];
  r.x_dtype = kDtypes[n[0]], r.weight_dtype = kDtypes[n[1]], r.y_dtype = kDtypes[n[2]];
  a.rows = n[3], r.cols = n[4], r.dy_stride = n[5], r.dsum_stride = n[6], r.h_stride = n[7];
  if (out[1] != nullptr)
    a.parts = static_cast<float*>(memory.room()(4 * rms_strips(a.rows, r.cols, true) * r.cols));
  launch_rms_norm_grad(a, out[1], nullptr);
}

// in: dout a b, out: out da db, or null. n: dtype gate rows cols dout_stride a_stride b_stride
// out_stride
API void emu_gated_act(const void* const* in, void* const* out, const int64_t* n) {
  GatedArgs a{};
  a.dout = in[0], a.a = in[1], a.b = in[2], a.out = out[0], a.da = out[1], a.db = out[2];
  a.rows = n[2], a.cols = n[3], a.dout_stride = n[4], a.a_stride = n[5], a.b_stride = n[6];
  a.out_stride = n[7];
  with_dtype(n[0], [&]<class T>() { launch_gated_act<T>(a, static_cast<Gate>(n[1]), nullptr); });
}

// in: x residual weight bias, out: y mean rstd. n: dtypes of x and weight, samples channels length
API void emu_gn1_gelu(const void* const* in, void* const* out, const int64_t* n,
                      const double* eps) {
  Memory memory;
  Gn1Args a{};
  a.x = in[0], a.residual = in[1], a.weight = in[2], a.bias = in[3], a.y = out[0];
  a.mean = static_cast<float*>(out[1]), a.rstd = static_cast<float*>(out[2]), a.eps = *eps;
  a.weight_dtype = kDtypes[n[1]], a.samples = n[2], a.channels = n[3], a.length = n[4];
  const int64_t parts = a.samples * gn1_parts(a.channels * a.length);
  a.parts = static_cast<Moments*>(memory.room()(parts * static_cast<int64_t>(sizeof(Moments))));
  a.of =
      static_cast<Gn1Sample*>(memory.room()(a.samples * static_cast<int64_t>(sizeof(Gn1Sample))));
  with_dtype(n[0], [&]<class T>() { launch_gn1_gelu<T>(a, nullptr); });
}

// in: dy x weight bias mean rstd, out: dx dweight dbias. n: as of emu_gn1_gelu
API void emu_gn1_gelu_grad(const void* const* in, void* const* out, const int64_t* n) {
  Memory memory;
  Gn1GradArgs a{};
  a.dy = in[0], a.x = in[1], a.weight = in[2], a.bias = in[3];
  a.mean = static_cast<const float*>(in[4]), a.rstd = static_cast<const float*>(in[5]);
  a.dx = out[0], a.dweight = out[1], a.dbias = out[2];
  a.weight_dtype = kDtypes[n[1]], a.samples = n[2], a.channels = n[3], a.length = n[4];
  const int64_t parts = a.samples * a.channels * gn1_pieces(a.length);
  a.parts = static_cast<Gn1Sums*>(memory.room()(parts * static_cast<int64_t>(sizeof(Gn1Sums))));
  a.means = static_cast<float*>(memory.room()(8 * a.samples));
  with_dtype(n[0], [&]<class T>() { launch_gn1_gelu_grad<T>(a, nullptr); });
}
