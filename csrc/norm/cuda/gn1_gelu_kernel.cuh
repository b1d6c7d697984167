// SPDX-License-Identifier: Apache-2.0
// Device code of gn1_gelu and its gradients (norm/gn1_gelu.h). Forward: a block makes the moments
// of kGn1Block neighbours from registers; one block per sample joins them in a fixed order; then
// vectors of the sample. Backward: sums of a row, or of a piece of it, by a block or a warp; one
// block per sample for its means, a thread per channel for the parameters; then vectors again.
#pragma once

#include "core/block_sums.cuh"
#include "core/vectors.cuh"
#include "norm/gn1_gelu.h"

namespace tenfold::cuda {

constexpr int kGn1Threads = 256;
constexpr int kGn1Vectors = 2;  // of a thread that applies
constexpr int64_t kGn1ShortRow = 1024;
constexpr float kGn1InverseSqrt2 = 0.7071067811865476f, kGn1Density = 0.3989422804014327f;

// What a sample's elements are normalised with: h = (x - center) rstd + rest.
struct Gn1Sample {
  float center, rstd, rest;
};

struct Gn1Args {
  const void *x, *residual;   // residual: or null
  const void *weight, *bias;  // of weight_dtype
  Dtype weight_dtype;
  void* y;
  float *mean, *rstd;  // results, or null
  Moments* parts;      // working memory: [samples, gn1_parts]
  Gn1Sample* of;       // working memory: [samples]
  double eps;
  int64_t samples, channels, length;
  bool wide, aligned;  // set by the launch: of rows, and of whole samples
};

inline int64_t gn1_parts(int64_t each) {
  return (each + kGn1Block - 1) / kGn1Block;
}
template <class T>
constexpr int64_t kGn1Apply = static_cast<int64_t>(kGn1Threads) * kGn1Vectors * kPerVector<T>;
template <class T>
int64_t gn1_apply_blocks(int64_t samples, int64_t each) {
  return samples * ((each + kGn1Apply<T> - 1) / kGn1Apply<T>);
}

__device__ inline float gn1_parameter(const void* p, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[i];
  if (dtype == Dtype::bf16) return to_float(static_cast<const bf16_t*>(p)[i]);
  return to_float(static_cast<const fp16_t*>(p)[i]);
}

template <class T>
__global__ void __launch_bounds__(kGn1Threads) gn1_moments_kernel(Gn1Args a) {
  constexpr int kEach = kPerVector<T>;
  constexpr int kLoads = static_cast<int>(kGn1Block) / kGn1Threads / kEach;
  TENFOLD_SHARED(float, memory, kGn1Threads / 32);
  const int64_t each = a.channels * a.length, parts = (each + kGn1Block - 1) / kGn1Block;
  const int64_t block = blockIdx.x, sample = block / parts, first = block % parts * kGn1Block;
  const T* const x = static_cast<const T*>(a.x) + sample * each;
  float held[kLoads][kEach];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kLoads; ++v) {
    const int64_t i = first + (static_cast<int64_t>(v) * kGn1Threads + threadIdx.x) * kEach;
    load_some<T, kEach>(x + i, each - i, a.aligned, held[v]);
#pragma unroll
    for (int k = 0; k < kEach; ++k) sum += held[v][k];
  }
  const int64_t n = each - first < kGn1Block ? each - first : kGn1Block;
  const auto count = static_cast<float>(n);
  const float center = block_sum<kGn1Threads>(sum, memory) / count;
  float rest = 0.0f, squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kLoads; ++v) {
    const int64_t i = (static_cast<int64_t>(v) * kGn1Threads + threadIdx.x) * kEach;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float d = i + k < n ? held[v][k] - center : 0.0f;
      rest += d;
      squares = fmaf(d, d, squares);
    }
  }
  rest = block_sum<kGn1Threads>(rest, memory);
  squares = block_sum<kGn1Threads>(squares, memory);
  if (threadIdx.x != 0) return;
  const double off = static_cast<double>(rest) / n, about = squares - off * off * n;
  a.parts[block] = {static_cast<double>(n), center + off,
                    about > 0.0 || about != about ? about : 0.0};
}

// Each thread joins neighbours; then threads in pairs.
static __global__ void __launch_bounds__(kGn1Threads) gn1_join_kernel(Gn1Args a, int64_t parts) {
  TENFOLD_SHARED(Moments, all, kGn1Threads);
  const int64_t sample = blockIdx.x, share = (parts + kGn1Threads - 1) / kGn1Threads;
  const auto me = static_cast<int64_t>(threadIdx.x);
  Moments mine{0.0, 0.0, 0.0};
  for (int64_t i = me * share; i < (me + 1) * share && i < parts; ++i)
    mine = joined(mine, a.parts[sample * parts + i]);
  all[me] = mine;
  __syncthreads();
  for (int step = 1; step < kGn1Threads; step *= 2) {
    if (me % (2 * step) == 0) all[me] = joined(all[me], all[me + step]);
    __syncthreads();
  }
  if (me != 0) return;
  const Moments m = all[0];
  const double root = gn1_rstd(m, a.eps);
  const auto center = static_cast<float>(m.mean);
  a.of[sample] = {center, static_cast<float>(root),
                  static_cast<float>((static_cast<double>(center) - m.mean) * root)};
  if (a.mean != nullptr) a.mean[sample] = m.count > 0.0 ? center : NAN;
  if (a.rstd != nullptr) a.rstd[sample] = m.count > 0.0 ? static_cast<float>(root) : NAN;
}

// Of element i of a sample; 32 bits where they do.
__device__ inline int64_t gn1_channel(int64_t i, int64_t length) {
  if (i >> 32 == 0 && length >> 32 == 0)
    return static_cast<uint32_t>(i) / static_cast<uint32_t>(length);
  return i / length;
}

// f(sample, first element, its channel) for this thread's vectors.
template <class T, class F>
__device__ inline void for_gn1(int64_t each, int64_t length, const F& f) {
  const int64_t parts = (each + kGn1Apply<T> - 1) / kGn1Apply<T>, block = blockIdx.x;
  const int64_t sample = block / parts;
  const int64_t first = block % parts * kGn1Apply<T> + threadIdx.x * kPerVector<T>;
#pragma unroll
  for (int v = 0; v < kGn1Vectors; ++v) {
    const int64_t i = first + static_cast<int64_t>(v) * kGn1Threads * kPerVector<T>;
    if (i < each) f(sample, i, gn1_channel(i, length));
  }
}

// The parameters of kEach neighbours from element i on: of one channel where rows are whole
// vectors.
template <int kEach>
__device__ inline void gn1_parameters(const void* weight, const void* bias, Dtype dtype, bool wide,
                                      int64_t i, int64_t channel, int64_t length, int64_t each,
                                      float (&w)[kEach], float (&b)[kEach]) {
  const float first_w = gn1_parameter(weight, dtype, channel);
  const float first_b = gn1_parameter(bias, dtype, channel);
#pragma unroll
  for (int k = 0; k < kEach; ++k) w[k] = first_w, b[k] = first_b;
  if (wide) return;
#pragma unroll
  for (int k = 1; k < kEach; ++k) {
    if (i + k >= each) break;
    const int64_t at = gn1_channel(i + k, length);
    w[k] = gn1_parameter(weight, dtype, at), b[k] = gn1_parameter(bias, dtype, at);
  }
}

template <class T>
__global__ void __launch_bounds__(kGn1Threads) gn1_gelu_kernel(Gn1Args a) {
  constexpr int kEach = kPerVector<T>;
  const int64_t each = a.channels * a.length;
  for_gn1<T>(each, a.length, [&](int64_t sample, int64_t i, int64_t channel) {
    const Gn1Sample of = a.of[sample];
    float x[kEach], w[kEach], b[kEach], more[kEach];
    const int64_t from = sample * each + i, n = each - i;
    load_some<T, kEach>(static_cast<const T*>(a.x) + from, n, a.aligned, x);
    if (a.residual != nullptr)
      load_some<T, kEach>(static_cast<const T*>(a.residual) + from, n, a.aligned, more);
    gn1_parameters<kEach>(a.weight, a.bias, a.weight_dtype, a.wide, i, channel, a.length, each, w,
                          b);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float h = fmaf(x[k] - of.center, of.rstd, of.rest), u = fmaf(h, w[k], b[k]);
      x[k] = u * (0.5f * erfcf(-u * kGn1InverseSqrt2));
      if (a.residual != nullptr) x[k] += more[k];
    }
    store_some<T, kEach>(x, static_cast<T*>(a.y) + from, n, a.aligned);
  });
}

template <class T>
void launch_gn1_gelu(Gn1Args a, cudaStream_t stream) {
  if (a.samples == 0) return;
  const int64_t each = a.channels * a.length, parts = gn1_parts(each);
  const auto aligned = [&](const void* data) {
    return data == nullptr || wide_rows<T, kPerVector<T>>(data, each, each);
  };
  a.aligned = aligned(a.x) && aligned(a.residual) && aligned(a.y);
  a.wide = a.length % kPerVector<T> == 0;
  if (each > 0) {
    TENFOLD_LAUNCH((gn1_moments_kernel<T>), static_cast<unsigned>(a.samples * parts), kGn1Threads,
                   stream, a);
  }
  TENFOLD_LAUNCH(gn1_join_kernel, static_cast<unsigned>(a.samples), kGn1Threads, stream, a, parts);
  if (each == 0) return;
  TENFOLD_LAUNCH((gn1_gelu_kernel<T>), static_cast<unsigned>(gn1_apply_blocks<T>(a.samples, each)),
                 kGn1Threads, stream, a);
}

// -- backward -------------------------------------------------------------------------------------

struct Gn1GradArgs {
  const void *dy, *x, *weight, *bias;
  const float *mean, *rstd;
  Dtype weight_dtype;
  void *dx, *dweight, *dbias;
  Gn1Sums* parts;  // working memory: [samples, channels, gn1_pieces], then sums of channels in the
                   // first of a channel's pieces
  float* means;    // working memory: [samples, 2], of w g and of w g h
  int64_t samples, channels, length;
  bool wide, aligned;
};

inline int64_t gn1_pieces(int64_t length) {
  return (length + kGn1Block - 1) / kGn1Block;
}

// gelu'(u) dy
__device__ inline float gn1_slope(float u, float dy) {
  const float below = 0.5f * erfcf(-u * kGn1InverseSqrt2);
  return dy * fmaf(u * kGn1Density, expf(-0.5f * u * u), below);
}

// kThreads threads have a piece of a row.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) gn1_sums_kernel(Gn1GradArgs a, int64_t pieces) {
  TENFOLD_SHARED(double, memory, kThreads / 32);
  const int64_t block = blockIdx.x, row = block / pieces, first = block % pieces * kGn1Block;
  const int64_t sample = row / a.channels, channel = row - sample * a.channels;
  const int64_t end = a.length < first + kGn1Block ? a.length : first + kGn1Block;
  const float mean = a.mean[sample], rstd = a.rstd[sample];
  const float w = gn1_parameter(a.weight, a.weight_dtype, channel);
  const float b = gn1_parameter(a.bias, a.weight_dtype, channel);
  const T* const x = static_cast<const T*>(a.x) + row * a.length;
  const T* const dy = static_cast<const T*>(a.dy) + row * a.length;
  constexpr int kEach = kPerVector<T>;
  float sum = 0.0f, with_h = 0.0f;
  for (int64_t i = first + threadIdx.x * kEach; i < end; i += kThreads * kEach) {
    float v[kEach], d[kEach];
    load_some<T, kEach>(x + i, end - i, a.wide, v);
    load_some<T, kEach>(dy + i, end - i, a.wide, d);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float h = (v[k] - mean) * rstd, g = gn1_slope(fmaf(h, w, b), d[k]);
      if (i + k < end) sum += g, with_h = fmaf(g, h, with_h);
    }
  }
  const double all = block_sum<kThreads>(static_cast<double>(sum), memory);
  const double all_h = block_sum<kThreads>(static_cast<double>(with_h), memory);
  if (threadIdx.x == 0) a.parts[block] = {all, all_h};
}

// Of a sample: pieces of its channels to one each, and its means.
static __global__ void __launch_bounds__(kGn1Threads)
    gn1_means_kernel(Gn1GradArgs a, int64_t pieces) {
  TENFOLD_SHARED(double, memory, kGn1Threads / 32);
  const int64_t sample = blockIdx.x;
  double by_g = 0.0, by_gh = 0.0;
  for (int64_t c = threadIdx.x; c < a.channels; c += kGn1Threads) {
    Gn1Sums* const own = a.parts + (sample * a.channels + c) * pieces;
    Gn1Sums all{0.0, 0.0};
    for (int64_t p = 0; p < pieces; ++p) all.g += own[p].g, all.gh += own[p].gh;
    own[0] = all;
    const float w = gn1_parameter(a.weight, a.weight_dtype, c);
    by_g += w * all.g, by_gh += w * all.gh;
  }
  by_g = block_sum<kGn1Threads>(by_g, memory);
  by_gh = block_sum<kGn1Threads>(by_gh, memory);
  if (threadIdx.x != 0) return;
  const auto n = static_cast<double>(a.channels * a.length);
  a.means[2 * sample] = static_cast<float>(by_g / n);
  a.means[2 * sample + 1] = static_cast<float>(by_gh / n);
}

static __global__ void __launch_bounds__(kGn1Threads)
    gn1_parameters_kernel(Gn1GradArgs a, int64_t pieces) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kGn1Threads + threadIdx.x;
  if (c >= a.channels) return;
  Gn1Sums all{0.0, 0.0};
  for (int64_t b = 0; pieces > 0 && b < a.samples; ++b) {
    const Gn1Sums& own = a.parts[(b * a.channels + c) * pieces];
    all.g += own.g, all.gh += own.gh;
  }
  const auto dw = static_cast<float>(all.gh), db = static_cast<float>(all.g);
  const auto put = [&]<class W>() {
    from_float(dw, static_cast<W*>(a.dweight) + c);
    from_float(db, static_cast<W*>(a.dbias) + c);
  };
  if (a.weight_dtype == Dtype::f32) return put.template operator()<float>();
  if (a.weight_dtype == Dtype::bf16) return put.template operator()<bf16_t>();
  put.template operator()<fp16_t>();
}

template <class T>
__global__ void __launch_bounds__(kGn1Threads) gn1_gelu_grad_kernel(Gn1GradArgs a) {
  constexpr int kEach = kPerVector<T>;
  const int64_t each = a.channels * a.length;
  for_gn1<T>(each, a.length, [&](int64_t sample, int64_t i, int64_t channel) {
    const float mean = a.mean[sample], rstd = a.rstd[sample];
    const float by_g = a.means[2 * sample], by_gh = a.means[2 * sample + 1];
    float x[kEach], d[kEach], w[kEach], b[kEach];
    const int64_t from = sample * each + i, n = each - i;
    load_some<T, kEach>(static_cast<const T*>(a.x) + from, n, a.aligned, x);
    load_some<T, kEach>(static_cast<const T*>(a.dy) + from, n, a.aligned, d);
    gn1_parameters<kEach>(a.weight, a.bias, a.weight_dtype, a.wide, i, channel, a.length, each, w,
                          b);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float h = (x[k] - mean) * rstd, g = gn1_slope(fmaf(h, w[k], b[k]), d[k]);
      x[k] = rstd * (w[k] * g - by_g - h * by_gh);
    }
    store_some<T, kEach>(x, static_cast<T*>(a.dx) + from, n, a.aligned);
  });
}

template <class T>
void launch_gn1_gelu_grad(Gn1GradArgs a, cudaStream_t stream) {
  if (a.channels == 0) return;
  const int64_t each = a.channels * a.length, pieces = gn1_pieces(a.length);
  const auto aligned = [&](const void* data) {
    return wide_rows<T, kPerVector<T>>(data, each, each);
  };
  a.aligned = aligned(a.x) && aligned(a.dy) && aligned(a.dx);
  a.wide = a.length % kPerVector<T> == 0 && aligned(a.x) && aligned(a.dy);
  const bool some = a.samples * each > 0;
  if (some) {
    const auto blocks = static_cast<unsigned>(a.samples * a.channels * pieces);
    if (a.length <= kGn1ShortRow) {
      TENFOLD_LAUNCH((gn1_sums_kernel<T, 32>), blocks, 32, stream, a, pieces);
    } else {
      TENFOLD_LAUNCH((gn1_sums_kernel<T, kGn1Threads>), blocks, kGn1Threads, stream, a, pieces);
    }
    TENFOLD_LAUNCH(gn1_means_kernel, static_cast<unsigned>(a.samples), kGn1Threads, stream, a,
                   pieces);
  }
  const auto blocks = static_cast<unsigned>((a.channels + kGn1Threads - 1) / kGn1Threads);
  TENFOLD_LAUNCH(gn1_parameters_kernel, blocks, kGn1Threads, stream, a, pieces);
  if (!some) return;
  TENFOLD_LAUNCH((gn1_gelu_grad_kernel<T>),
                 static_cast<unsigned>(gn1_apply_blocks<T>(a.samples, each)), kGn1Threads, stream,
                 a);
}

}  // namespace tenfold::cuda
