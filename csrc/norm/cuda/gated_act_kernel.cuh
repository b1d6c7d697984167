// SPDX-License-Identifier: Apache-2.0
// Device code of swiglu, gated_gelu and their gradients (norm/gated_act.h): a thread has two
// vectors of a row. Rows that lie one after another are one.
#pragma once

#include "core/vectors.cuh"
#include "norm/gated_act.h"

namespace tenfold::cuda {

constexpr int kGatedThreads = 128, kGatedVectors = 2;

template <class T>
constexpr int64_t kGatedBlock = static_cast<int64_t>(kGatedThreads) * kGatedVectors * kPerVector<T>;

inline int64_t gated_parts(int64_t cols, Dtype dtype) {
  const int64_t block = dtype == Dtype::f32 ? kGatedBlock<float> : kGatedBlock<bf16_t>;
  return (cols + block - 1) / block;
}

struct GatedArgs {
  const void *dout, *a, *b;                                         // dout: of gradients
  void *out, *da, *db;                                              // da, db: or null
  int64_t rows, cols, dout_stride, a_stride, b_stride, out_stride;  // out_stride: of da and db too
  bool wide;
};

// 1 / (1 + e^-x) and its derivative, relatively exact on both sides.
__device__ inline float gate_logistic(float x, float* slope) {
  const float e = expf(-fabsf(x)), inverse = 1.0f / (1.0f + e), small = e * inverse;
  *slope = small * inverse;
  return x < 0.0f ? small : inverse;
}

// p(a), and p + a p'.
template <Gate kGate>
__device__ inline void gate_part(float a, float* p, float* slope) {
  if constexpr (kGate == Gate::gelu) {
    *p = 0.5f * erfcf(-a * kInverseSqrt2);
    *slope = fmaf(a * kInverseSqrt2Pi, expf(-0.5f * a * a), *p);
  } else if constexpr (kGate == Gate::gelu_tanh) {
    const float square = a * a > kGeluFar ? kGeluFar : a * a;
    *p = gate_logistic(a * fmaf(square, kGeluCube, kGeluSlope), slope);
    *slope = fmaf(a * fmaf(square, 3.0f * kGeluCube, kGeluSlope), *slope, *p);
  } else {
    *p = gate_logistic(a, slope);
    *slope = fmaf(a, *slope, *p);
  }
}

// f(first column) for this thread's vectors; the row's number.
template <class T, class F>
__device__ inline void for_gated(const GatedArgs& a, const F& f) {
  const int64_t parts = (a.cols + kGatedBlock<T> - 1) / kGatedBlock<T>;
  const int64_t row = blockIdx.x / parts;
  const int64_t first = blockIdx.x % parts * kGatedBlock<T> + threadIdx.x * kPerVector<T>;
#pragma unroll
  for (int v = 0; v < kGatedVectors; ++v) {
    const int64_t j = first + static_cast<int64_t>(v) * kGatedThreads * kPerVector<T>;
    if (j < a.cols) f(row, j);
  }
}

template <class T, Gate kGate>
__global__ void __launch_bounds__(kGatedThreads) gated_act_kernel(GatedArgs args) {
  constexpr int kEach = kPerVector<T>;
  for_gated<T>(args, [&](int64_t row, int64_t j) {
    float a[kEach], b[kEach];
    const int64_t n = args.cols - j;
    load_some<T, kEach>(static_cast<const T*>(args.a) + row * args.a_stride + j, n, args.wide, a);
    load_some<T, kEach>(static_cast<const T*>(args.b) + row * args.b_stride + j, n, args.wide, b);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      float p, slope;
      gate_part<kGate>(a[k], &p, &slope);
      a[k] = a[k] * p * b[k];
    }
    store_some<T, kEach>(a, static_cast<T*>(args.out) + row * args.out_stride + j, n, args.wide);
  });
}

template <class T, Gate kGate>
__global__ void __launch_bounds__(kGatedThreads) gated_act_grad_kernel(GatedArgs args) {
  constexpr int kEach = kPerVector<T>;
  for_gated<T>(args, [&](int64_t row, int64_t j) {
    float a[kEach], b[kEach], d[kEach], of_b[kEach];
    const int64_t n = args.cols - j, to = row * args.out_stride + j;
    load_some<T, kEach>(static_cast<const T*>(args.dout) + row * args.dout_stride + j, n, args.wide,
                        d);
    load_some<T, kEach>(static_cast<const T*>(args.a) + row * args.a_stride + j, n, args.wide, a);
    if (args.da != nullptr)
      load_some<T, kEach>(static_cast<const T*>(args.b) + row * args.b_stride + j, n, args.wide, b);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      float p, slope;
      gate_part<kGate>(a[k], &p, &slope);
      of_b[k] = d[k] * (a[k] * p);
      if (args.da != nullptr) a[k] = d[k] * b[k] * slope;
    }
    if (args.da != nullptr) store_some<T, kEach>(a, static_cast<T*>(args.da) + to, n, args.wide);
    if (args.db != nullptr) store_some<T, kEach>(of_b, static_cast<T*>(args.db) + to, n, args.wide);
  });
}

// All but wide; forward where dout is null.
template <class T>
inline void launch_gated_act(GatedArgs a, Gate gate, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return;
  constexpr int kEach = kPerVector<T>;
  const auto wide = [&](const void* data, int64_t stride) {
    return data == nullptr || wide_rows<T, kEach>(data, stride, a.cols);
  };
  a.wide = wide(a.dout, a.dout_stride) && wide(a.a, a.a_stride) && wide(a.b, a.b_stride) &&
           wide(a.out, a.out_stride) && wide(a.da, a.out_stride) && wide(a.db, a.out_stride);
  const int64_t parts = (a.cols + kGatedBlock<T> - 1) / kGatedBlock<T>;
  const auto blocks = static_cast<unsigned>(a.rows * parts);
  const auto run = [&]<Gate kGate>() {
    if (a.dout == nullptr) {
      TENFOLD_LAUNCH((gated_act_kernel<T, kGate>), blocks, kGatedThreads, stream, a);
    } else {
      TENFOLD_LAUNCH((gated_act_grad_kernel<T, kGate>), blocks, kGatedThreads, stream, a);
    }
  };
  if (gate == Gate::silu) return run.template operator()<Gate::silu>();
  if (gate == Gate::gelu_tanh) return run.template operator()<Gate::gelu_tanh>();
  run.template operator()<Gate::gelu>();
}

}  // namespace tenfold::cuda
