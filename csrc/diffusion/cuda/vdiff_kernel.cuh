// SPDX-License-Identifier: Apache-2.0
// Device code of vdiff_noise, vdiff_loss and vdiff_step (diffusion/vdiff.h). A block has a stretch
// of one sample, a thread a few vectors of 16 bytes; one thread makes the sample's coefficients in
// double from times that are read on the device. Sums of blocks are added in order by one block per
// sample: the same bits every time.
#pragma once

#include "core/block_sums.cuh"
#include "core/vectors.cuh"
#include "diffusion/vdiff.h"

namespace tenfold::cuda {

constexpr int kVdiffThreads = 256, kVdiffVectors = 4;

// Elements that a thread takes at once: 16 bytes of the narrower of both dtypes.
template <class T, class V>
constexpr int kVdiffEach = kPerVector<V> > kPerVector<T> ? kPerVector<V> : kPerVector<T>;
template <class T, class V>
constexpr int64_t kVdiffBlock =
    static_cast<int64_t>(kVdiffThreads) * kVdiffVectors * kVdiffEach<T, V>;

template <class T, class V>
int64_t vdiff_blocks(int64_t each) {
  return (each + kVdiffBlock<T, V> - 1) / kVdiffBlock<T, V>;
}

// Where a block is: its sample, and f(first element) for the vectors of this thread.
struct VdiffPlace {
  int64_t sample, part;
};
template <class T, class V>
__device__ inline VdiffPlace vdiff_place(int64_t each) {
  const int64_t parts = (each + kVdiffBlock<T, V> - 1) / kVdiffBlock<T, V>;
  const int64_t block = blockIdx.x;
  return {block / parts, block % parts};
}
template <class T, class V, class F>
__device__ inline void for_vdiff(const VdiffPlace& at, int64_t each, const F& f) {
  constexpr int kEach = kVdiffEach<T, V>;
  const int64_t first = at.part * kVdiffBlock<T, V> + threadIdx.x * kEach;
#pragma unroll
  for (int v = 0; v < kVdiffVectors; ++v) {
    const int64_t i = first + static_cast<int64_t>(v) * kVdiffThreads * kEach;
    if (i < each) f(i);
  }
}

// Numbers of the stream at kN positions from p on, kN a multiple of 4.
template <int kN>
__device__ inline void draw(const NoiseStream& stream, uint64_t p, float (&e)[kN]) {
  const int shift = static_cast<int>(p % 4);
  float numbers[kN + 4];
#pragma unroll
  for (int g = 0; g <= kN / 4; ++g) {
    if (g == kN / 4 && shift == 0) break;
    float four[4];
    four_normals(stream, p / 4 + static_cast<uint64_t>(g), four);
#pragma unroll
    for (int k = 0; k < 4; ++k) numbers[4 * g + k] = four[k];
  }
#pragma unroll
  for (int k = 0; k < kN; ++k) {  // no index that is not known: all stays in registers
    e[k] = shift == 0   ? numbers[k]
           : shift == 1 ? numbers[k + 1]
           : shift == 2 ? numbers[k + 2]
                        : numbers[k + 3];
  }
}

struct NoiseArgs {
  const void *x0, *noise;  // noise null: drawn
  void *z, *v;             // or null
  PerSample t;
  NoiseStream stream;
  int64_t samples, each;
  bool wide;  // set by the launch
};

template <class T, bool kDrawn>
__global__ void __launch_bounds__(kVdiffThreads) vdiff_noise_kernel(NoiseArgs a) {
  constexpr int kEach = kPerVector<T>;
  TENFOLD_SHARED(float, angle, 2);
  const VdiffPlace at = vdiff_place<T, T>(a.each);
  if (threadIdx.x == 0) {
    const VdiffAngle r = vdiff_angle(a.t[at.sample]);
    angle[0] = static_cast<float>(r.a), angle[1] = static_cast<float>(r.s);
  }
  __syncthreads();
  const float c = angle[0], s = angle[1];
  for_vdiff<T, T>(at, a.each, [&](int64_t i) {
    float x[kEach], e[kEach], made[kEach];
    const int64_t from = at.sample * a.each + i, n = a.each - i;
    load_some<T, kEach>(static_cast<const T*>(a.x0) + from, n, a.wide, x);
    if constexpr (kDrawn) {
      draw<kEach>(a.stream, static_cast<uint64_t>(from), e);
    } else {
      load_some<T, kEach>(static_cast<const T*>(a.noise) + from, n, a.wide, e);
    }
    if (a.z != nullptr) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) made[k] = fmaf(s, e[k], c * x[k]);
      store_some<T, kEach>(made, static_cast<T*>(a.z) + from, n, a.wide);
    }
    if (a.v != nullptr) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) made[k] = fmaf(c, e[k], -(s * x[k]));
      store_some<T, kEach>(made, static_cast<T*>(a.v) + from, n, a.wide);
    }
  });
}

template <class T>
inline bool vdiff_wide(const void* data, int64_t each, int lanes) {
  return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 16 == 0 && each % lanes == 0);
}

template <class T>
void launch_vdiff_noise(NoiseArgs a, cudaStream_t stream) {
  if (a.samples == 0 || a.each == 0) return;
  a.wide = true;
  for (const void* data :
       {a.x0, a.noise, static_cast<const void*>(a.z), static_cast<const void*>(a.v)})
    a.wide = a.wide && vdiff_wide<T>(data, a.each, kPerVector<T>);
  const auto blocks = static_cast<unsigned>(a.samples * vdiff_blocks<T, T>(a.each));
  if (a.noise == nullptr) {
    TENFOLD_LAUNCH((vdiff_noise_kernel<T, true>), blocks, kVdiffThreads, stream, a);
  } else {
    TENFOLD_LAUNCH((vdiff_noise_kernel<T, false>), blocks, kVdiffThreads, stream, a);
  }
}

// -- loss -----------------------------------------------------------------------------------------

struct LossArgs {
  const void *v_hat, *x0, *noise;
  const float* grad_loss;  // [samples]; null: the loss is asked for
  void* grad;
  float* loss;
  double* parts;  // working memory: a number for each block
  PerSample t;
  int64_t samples, each;
  bool wide;
};

template <class T, class V, bool kGrad>
__global__ void __launch_bounds__(kVdiffThreads) vdiff_loss_kernel(LossArgs a) {
  constexpr int kEach = kVdiffEach<T, V>;
  TENFOLD_SHARED(float, angle, 3);
  TENFOLD_SHARED(double, sums, kVdiffThreads / 32);
  const VdiffPlace at = vdiff_place<T, V>(a.each);
  if (threadIdx.x == 0) {
    const VdiffAngle r = vdiff_angle(a.t[at.sample]);
    angle[0] = static_cast<float>(r.a), angle[1] = static_cast<float>(r.s);
    if constexpr (kGrad)
      angle[2] = static_cast<float>(2.0 * a.grad_loss[at.sample] / static_cast<double>(a.each));
  }
  __syncthreads();
  const float c = angle[0], s = angle[1], factor = kGrad ? angle[2] : 0.0f;
  float sum = 0.0f;
  for_vdiff<T, V>(at, a.each, [&](int64_t i) {
    float x[kEach], e[kEach], w[kEach];
    const int64_t from = at.sample * a.each + i, n = a.each - i;
    load_some<T, kEach>(static_cast<const T*>(a.x0) + from, n, a.wide, x);
    load_some<T, kEach>(static_cast<const T*>(a.noise) + from, n, a.wide, e);
    load_some<V, kEach>(static_cast<const V*>(a.v_hat) + from, n, a.wide, w);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float d = w[k] - fmaf(c, e[k], -(s * x[k]));
      // What is not there would be 0 times infinity where a coefficient is.
      if (!kGrad && k < n) sum = fmaf(d, d, sum);
      w[k] = d * factor;
    }
    if constexpr (kGrad) store_some<V, kEach>(w, static_cast<V*>(a.grad) + from, n, a.wide);
  });
  if constexpr (!kGrad) {
    const double all = block_sum<kVdiffThreads>(static_cast<double>(sum), sums);
    if (threadIdx.x == 0) a.parts[blockIdx.x] = all;
  }
}

static __global__ void __launch_bounds__(kVdiffThreads)
    vdiff_loss_sums_kernel(LossArgs a, int64_t parts) {
  TENFOLD_SHARED(double, sums, kVdiffThreads / 32);
  const int64_t sample = blockIdx.x;
  double mine = 0.0;
  for (int64_t i = threadIdx.x; i < parts; i += kVdiffThreads) mine += a.parts[sample * parts + i];
  const double all = block_sum<kVdiffThreads>(mine, sums);
  if (threadIdx.x == 0) a.loss[sample] = static_cast<float>(all / static_cast<double>(a.each));
}

template <class T, class V>
void launch_vdiff_loss(LossArgs a, cudaStream_t stream) {
  if (a.samples == 0) return;
  constexpr int kEach = kVdiffEach<T, V>;
  a.wide = vdiff_wide<T>(a.x0, a.each, kEach) && vdiff_wide<T>(a.noise, a.each, kEach) &&
           vdiff_wide<V>(a.v_hat, a.each, kEach) && vdiff_wide<V>(a.grad, a.each, kEach);
  const int64_t parts = vdiff_blocks<T, V>(a.each);
  const auto blocks = static_cast<unsigned>(a.samples * parts);
  if (a.grad_loss != nullptr) {
    if (blocks > 0) {
      TENFOLD_LAUNCH((vdiff_loss_kernel<T, V, true>), blocks, kVdiffThreads, stream, a);
    }
    return;
  }
  if (blocks > 0) {
    TENFOLD_LAUNCH((vdiff_loss_kernel<T, V, false>), blocks, kVdiffThreads, stream, a);
  }
  TENFOLD_LAUNCH(vdiff_loss_sums_kernel, static_cast<unsigned>(a.samples), kVdiffThreads, stream, a,
                 parts);
}

// -- step -----------------------------------------------------------------------------------------

struct StepArgs {
  const void *z, *v, *v_uncond, *noise;  // v_uncond, noise: or null
  void *z_next, *x0_hat;                 // x0_hat: or null
  PerSample t, u, guidance;
  StepOptions options;
  int64_t samples, each;
  bool wide;
};

enum : int { kStepA, kStepS, kStepX, kStepZ, kStepW, kStepE, kStepG, kStepNumbers };

template <class T, class V>
__global__ void __launch_bounds__(kVdiffThreads) vdiff_step_kernel(StepArgs a) {
  constexpr int kEach = kVdiffEach<T, V>;
  TENFOLD_SHARED(float, rule, kStepNumbers);
  const VdiffPlace at = vdiff_place<T, V>(a.each);
  if (threadIdx.x == 0) {
    const StepRule r = step_rule(a.t[at.sample], a.u[at.sample], a.options);
    rule[kStepA] = static_cast<float>(r.a), rule[kStepS] = static_cast<float>(r.s);
    rule[kStepX] = static_cast<float>(r.kx), rule[kStepZ] = static_cast<float>(r.kz);
    rule[kStepW] = static_cast<float>(r.kw), rule[kStepE] = static_cast<float>(r.ke);
    rule[kStepG] = a.v_uncond != nullptr ? static_cast<float>(a.guidance[at.sample]) : 1.0f;
  }
  __syncthreads();
  const float c = rule[kStepA], s = rule[kStepS], kx = rule[kStepX], kz = rule[kStepZ];
  const float kw = rule[kStepW], ke = rule[kStepE], g = rule[kStepG];
  const float clip = static_cast<float>(a.options.clip);
  const bool guided = a.v_uncond != nullptr && g != 1.0f, clips = a.options.clips;
  const bool general = clips || a.options.plus_plus, plus_plus = a.options.plus_plus;
  for_vdiff<T, V>(at, a.each, [&](int64_t i) {
    float z[kEach], w[kEach], free[kEach];
    const int64_t from = at.sample * a.each + i, n = a.each - i;
    load_some<T, kEach>(static_cast<const T*>(a.z) + from, n, a.wide, z);
    load_some<V, kEach>(static_cast<const V*>(a.v) + from, n, a.wide, w);
    if (guided) load_some<V, kEach>(static_cast<const V*>(a.v_uncond) + from, n, a.wide, free);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {  // z becomes z_next, w becomes x0
      float e = w[k];
      if (guided) {
        w[k] = fmaf(g, w[k] - free[k], free[k]);
        e = plus_plus ? free[k] : w[k];
      }
      float x = fmaf(-s, w[k], c * z[k]);
      if (clips) x = x < -clip ? -clip : x > clip ? clip : x;
      z[k] = fmaf(kw, e, kz * z[k]);
      if (general) z[k] = fmaf(kx, x, z[k]);
      w[k] = x;
    }
    if (a.noise != nullptr) {
      load_some<T, kEach>(static_cast<const T*>(a.noise) + from, n, a.wide, free);
#pragma unroll
      for (int k = 0; k < kEach; ++k) z[k] = fmaf(ke, free[k], z[k]);
    }
    store_some<T, kEach>(z, static_cast<T*>(a.z_next) + from, n, a.wide);
    if (a.x0_hat != nullptr) store_some<T, kEach>(w, static_cast<T*>(a.x0_hat) + from, n, a.wide);
  });
}

template <class T, class V>
void launch_vdiff_step(StepArgs a, cudaStream_t stream) {
  if (a.samples == 0 || a.each == 0) return;
  constexpr int kEach = kVdiffEach<T, V>;
  a.wide = vdiff_wide<T>(a.z, a.each, kEach) && vdiff_wide<V>(a.v, a.each, kEach) &&
           vdiff_wide<V>(a.v_uncond, a.each, kEach) && vdiff_wide<T>(a.noise, a.each, kEach) &&
           vdiff_wide<T>(a.z_next, a.each, kEach) && vdiff_wide<T>(a.x0_hat, a.each, kEach);
  const auto blocks = static_cast<unsigned>(a.samples * vdiff_blocks<T, V>(a.each));
  TENFOLD_LAUNCH((vdiff_step_kernel<T, V>), blocks, kVdiffThreads, stream, a);
}

}  // namespace tenfold::cuda
