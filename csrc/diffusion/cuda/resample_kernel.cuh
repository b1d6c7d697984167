// SPDX-License-Identifier: Apache-2.0
// Device code of fir_down2, fir_up2_cat and their gradients (diffusion/resample.h). A thread makes
// four outputs of a sum of eight, or eight of sums of four, from aligned vectors of neighbours;
// near the ends of a row, and where rows are not aligned, the definition itself, in double.
#pragma once

#include "core/vectors.cuh"
#include "diffusion/resample.h"

namespace tenfold::cuda {

constexpr int kFirThreads = 256;
constexpr int kFirFour = 4;

struct FirArgs {
  Fir kind;
  FirRows x, y, skip;
  int64_t batch, channels, skipped;  // channels that are made, and copied
  int64_t length, outputs;           // of fir_at, and of a row
  bool wide;                         // set by the launch
};

// Outputs of a thread.
TENFOLD_HD int fir_each(Fir kind) {
  return kind == Fir::down || kind == Fir::up_grad ? kFirFour : 2 * kFirFour;
}
inline int64_t fir_blocks(const FirArgs& a) {
  const int64_t groups = (a.outputs + fir_each(a.kind) - 1) / fir_each(a.kind);
  return (a.batch * a.channels * groups + kFirThreads - 1) / kFirThreads;
}
inline int64_t fir_copy_blocks(const FirArgs& a) {
  const int64_t groups = (a.outputs + 2 * kFirFour - 1) / (2 * kFirFour);
  return (a.batch * a.skipped * groups + kFirThreads - 1) / kFirThreads;
}

struct FirPlace {
  int64_t batch, channel, first;  // first: of its outputs
};

// Item `i` of rows of `groups`; 32 bits where they do.
__device__ inline FirPlace fir_place(int64_t i, int64_t groups, int64_t channels, int each) {
  int64_t row, group;
  if (i >> 32 == 0 && groups >> 32 == 0) {
    row = static_cast<uint32_t>(i) / static_cast<uint32_t>(groups);
  } else {
    row = i / groups;
  }
  group = i - row * groups;
  const int64_t batch = row / channels;
  return {batch, row - batch * channels, group * each};
}

template <class T>
__device__ inline T* fir_row_at(const FirRows& r, const FirPlace& at) {
  return static_cast<T*>(r.data) + at.batch * r.batch_step + at.channel * r.row_step;
}

template <class T, Fir kKind>
__global__ void __launch_bounds__(kFirThreads) fir_kernel(FirArgs a) {
  constexpr bool kReduces = kKind == Fir::down || kKind == Fir::up_grad;
  constexpr float kBy = kKind == Fir::up || kKind == Fir::up_grad ? 2.0f : 1.0f;
  constexpr int kEach = kReduces ? kFirFour : 2 * kFirFour;
  const int64_t groups = (a.outputs + kEach - 1) / kEach;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kFirThreads + threadIdx.x;
  if (item >= a.batch * a.channels * groups) return;
  const FirPlace at = fir_place(item, groups, a.channels, kEach);
  const T* const x = fir_row_at<T>(a.x, at);
  T* const y = fir_row_at<T>(a.y, at) + at.first;
  const int64_t left = a.outputs - at.first;
  // As far from both ends as no reflection reaches, nor what a vector reads beside it.
  if (at.first < 8 || left < 8 + kEach) {
    for (int k = 0; k < kEach && k < left; ++k) {
      const double made =
          fir_at<double>(kKind, at.first + k, a.length, [&](int64_t j) { return to_float(x[j]); });
      from_float(static_cast<float>(made), y + k);
    }
    return;
  }
  constexpr float t0 = kBy * kFir0, t1 = kBy * kFir1, t2 = kBy * kFir2, t3 = kBy * kFir3;
  if constexpr (kReduces) {
    float in[4 * kFirFour];  // x[2 first - 4] ..
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      float four[kFirFour];
      load_some<T, kFirFour>(x + 2 * at.first - 4 + 4 * v, kFirFour, a.wide, four);
#pragma unroll
      for (int k = 0; k < kFirFour; ++k) in[4 * v + k] = four[k];
    }
    float made[kFirFour];
#pragma unroll
    for (int j = 0; j < kFirFour; ++j) {
      const float* const p = in + 2 * j + 1;  // x[2 (first + j) - 3]
      made[j] = t0 * (p[0] + p[7]);
      made[j] = fmaf(t1, p[1] + p[6], made[j]);
      made[j] = fmaf(t2, p[2] + p[5], made[j]);
      made[j] = fmaf(t3, p[3] + p[4], made[j]);
    }
    store_some<T, kFirFour>(made, y, kFirFour, a.wide);
  } else {
    float in[3 * kFirFour];  // x[first / 2 - 4] ..
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      float four[kFirFour];
      load_some<T, kFirFour>(x + at.first / 2 - 4 + 4 * v, kFirFour, a.wide, four);
#pragma unroll
      for (int k = 0; k < kFirFour; ++k) in[4 * v + k] = four[k];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float made[kFirFour];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float* const p = in + 2 + 2 * half + k;  // x[m - 2]
        made[2 * k] = fmaf(t0, p[0], fmaf(t2, p[1], fmaf(t1, p[3], t3 * p[2])));
        made[2 * k + 1] = fmaf(t0, p[4], fmaf(t2, p[3], fmaf(t1, p[1], t3 * p[2])));
      }
      store_some<T, kFirFour>(made, y + kFirFour * half, kFirFour, a.wide);
    }
  }
}

// What is behind the rows that are made, bit for bit.
template <class T>
__global__ void __launch_bounds__(kFirThreads) fir_copy_kernel(FirArgs a) {
  constexpr int kEach = 2 * kFirFour;
  const int64_t groups = (a.outputs + kEach - 1) / kEach;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kFirThreads + threadIdx.x;
  if (item >= a.batch * a.skipped * groups) return;
  const FirPlace at = fir_place(item, groups, a.skipped, kEach);
  const T* const from = fir_row_at<T>(a.skip, at) + at.first;
  T* const to = fir_row_at<T>(a.y, {at.batch, at.channel + a.channels, 0}) + at.first;
  const int64_t left = a.outputs - at.first;
  if (a.wide && left >= kEach) {
    constexpr int kVectors = kEach * static_cast<int>(sizeof(T)) / 16;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<const uint4*>(from)[v];
    return;
  }
  for (int k = 0; k < kEach && k < left; ++k) to[k] = from[k];
}

template <class T>
void launch_fir(FirArgs a, cudaStream_t stream) {
  if (a.batch == 0) return;
  const auto aligned = [](const FirRows& r) {
    constexpr int64_t kSize = sizeof(T);
    return reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.batch_step * kSize % 16 == 0 &&
           r.row_step * kSize % 16 == 0;
  };
  a.wide = aligned(a.x) && aligned(a.y);
  if (a.channels > 0) {
    const auto blocks = static_cast<unsigned>(fir_blocks(a));
    const auto run = [&]<Fir kKind>() {
      TENFOLD_LAUNCH((fir_kernel<T, kKind>), blocks, kFirThreads, stream, a);
    };
    if (a.kind == Fir::down) run.template operator()<Fir::down>();
    if (a.kind == Fir::up) run.template operator()<Fir::up>();
    if (a.kind == Fir::down_grad) run.template operator()<Fir::down_grad>();
    if (a.kind == Fir::up_grad) run.template operator()<Fir::up_grad>();
  }
  if (a.skipped == 0) return;
  a.wide = aligned(a.skip) && aligned(a.y);
  TENFOLD_LAUNCH((fir_copy_kernel<T>), static_cast<unsigned>(fir_copy_blocks(a)), kFirThreads,
                 stream, a);
}

}  // namespace tenfold::cuda
