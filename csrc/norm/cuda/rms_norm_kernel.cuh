// SPDX-License-Identifier: Apache-2.0
// Device code of rms_norm and its gradients (norm/rms_norm.h). A warp has a row of up to 1,024
// elements, a block a longer one; a thread keeps kRmsKept elements of it in registers, and reads
// what is beyond a second time. Gradients: a block walks over a strip of rows, which it reads twice
// (the second time from the first cache, so that registers are left for more warps), and keeps its
// sums for the weight in registers; then sums of strips are added in order.
#pragma once

#include "core/block_sums.cuh"
#include "core/vectors.cuh"
#include "norm/rms_norm.h"

namespace tenfold::cuda {

constexpr int kRmsThreads = 256, kRmsKept = 32;

// Elements that a thread loads at once.
template <class X>
constexpr int kRmsEach = kPerVector<X>;
// Of a row, by kRowThreads threads.
constexpr int64_t rms_kept(int row_threads) {
  return static_cast<int64_t>(row_threads) * kRmsKept;
}

struct RmsArgs {
  RmsRows r;
  int64_t rows;
};

struct RmsGradArgs {
  RmsGradRows r;
  int64_t rows, strip;  // strip: rows of a block
  float* parts;         // [blocks, cols], sums of strips; or null
};

template <class T>
__device__ inline float rounded(float x) {
  T y;
  from_float(x, &y);
  return to_float(y);
}

// The dtype of weights is that of x or float32; with x in float32 and y in another, that of y.
template <class X, class Y, int kEach>
__device__ inline void load_weight(const void* weight, Dtype dtype, int64_t j, int64_t n, bool wide,
                                   float (&w)[kEach]) {
  const auto load = [&]<class W>() {
    load_some<W, kEach>(static_cast<const W*>(weight) + j, n, wide, w);
  };
  if constexpr (sizeof(X) == 4 && sizeof(Y) == 2) {
    load.template operator()<Y>();
  } else if (dtype == Dtype::f32) {
    load.template operator()<float>();
  } else if constexpr (sizeof(X) == 2) {
    load.template operator()<X>();
  } else {
    load.template operator()<bf16_t>();
    if (dtype == Dtype::bf16) return;
#pragma unroll
    for (int k = 0; k < kEach; ++k)  // these floats begin with the bits that were loaded
      w[k] = to_float(fp16_t{static_cast<uint16_t>(float_to_bits(w[k]) >> 16)});
  }
}

// Over the threads of a row; in all of them.
template <int kRowThreads>
__device__ inline float row_sum(float x, float* memory) {
  if constexpr (kRowThreads == 32) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
  } else {
    return block_sum<kRowThreads>(x, memory);
  }
}

// One thread's part of a row: f(chunk, first element) for what it keeps, g(first element) for what
// is beyond.
template <class X, int kRowThreads, class F, class G>
__device__ inline void for_chunks(int64_t cols, const F& f, const G& g) {
  constexpr int kEach = kRmsEach<X>;
  const int64_t first = static_cast<int64_t>(threadIdx.x % kRowThreads) * kEach;
  constexpr int64_t kStep = static_cast<int64_t>(kRowThreads) * kEach;
#pragma unroll
  for (int c = 0; c < kRmsKept / kEach; ++c) {
    const int64_t j = first + c * kStep;
    if (j < cols) f(c, j);
  }
  if constexpr (kRowThreads > 32)  // a warp keeps all of its rows
    for (int64_t j = first + rms_kept(kRowThreads); j < cols; j += kStep) g(j);
}

template <class X, class Y, int kRowThreads, bool kWide>
__global__ void __launch_bounds__(kRmsThreads) rms_norm_kernel(RmsArgs a) {
  constexpr int kEach = kRmsEach<X>, kGroups = kRmsThreads / kRowThreads;
  TENFOLD_SHARED(float, memory, kRmsThreads / 32);
  const RmsRows& r = a.r;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kGroups + static_cast<int>(threadIdx.x) / kRowThreads;
  const int64_t cols = row < a.rows ? r.cols : 0;
  const auto left = [&](int64_t j) { return kWide ? kEach : cols - j; };
  const X* const x = static_cast<const X*>(r.x) + row * r.x_stride;
  const X* const residual = static_cast<const X*>(r.residual) + row * r.residual_stride;
  X* const sum = static_cast<X*>(r.sum) + row * r.sum_stride;
  Y* const y = static_cast<Y*>(r.y) + row * r.y_stride;

  float squares = 0.0f;
  // h of the elements from j on; adds their squares.
  const auto read = [&](int64_t j, float (&h)[kEach]) {
    load_some<X, kEach>(x + j, left(j), kWide, h);
    if (r.residual != nullptr) {
      float more[kEach];
      load_some<X, kEach>(residual + j, left(j), kWide, more);
#pragma unroll
      for (int k = 0; k < kEach; ++k) h[k] = rounded<X>(h[k] + more[k]);
      store_some<X, kEach>(h, sum + j, left(j), kWide);
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) squares = fmaf(h[k], h[k], squares);
  };
  float kept[kRmsKept / kEach][kEach];
  for_chunks<X, kRowThreads>(
      cols, [&](int c, int64_t j) { read(j, kept[c]); },
      [&](int64_t j) {
        float h[kEach];
        read(j, h);
      });
  const float mean = row_sum<kRowThreads>(squares, memory) / static_cast<float>(r.cols);
  const float rstd = 1.0f / sqrtf(mean + r.eps);
  if (row < a.rows && r.rstd != nullptr && threadIdx.x % kRowThreads == 0) r.rstd[row] = rstd;

  const auto write = [&](int64_t j, const float (&h)[kEach]) {
    float w[kEach], out[kEach];
    load_weight<X, Y>(r.weight, r.weight_dtype, j, left(j), kWide, w);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float normal = h[k] * rstd;
      out[k] = (r.rounds ? rounded<Y>(normal) : normal) * w[k];
    }
    store_some<Y, kEach>(out, y + j, left(j), kWide);
  };
  for_chunks<X, kRowThreads>(
      cols, [&](int c, int64_t j) { write(j, kept[c]); },
      [&](int64_t j) {
        float h[kEach];
        load_some<X, kEach>((r.residual != nullptr ? sum : x) + j, left(j), kWide, h);
        write(j, h);
      });
}

template <class X, class Y, int kRowThreads, bool kWide>
__global__ void __launch_bounds__(kRmsThreads) rms_norm_grad_kernel(RmsGradArgs a) {
  constexpr int kEach = kRmsEach<X>, kGroups = kRmsThreads / kRowThreads;
  constexpr int kChunks = kRmsKept / kEach;
  TENFOLD_SHARED(float, memory, kRmsThreads / 32);
  TENFOLD_SHARED(float, joined, kGroups > 1 ? rms_kept(kRowThreads) : 1);
  const RmsGradRows& r = a.r;
  const int group = static_cast<int>(threadIdx.x) / kRowThreads;
  const int64_t begin = blockIdx.x * a.strip;
  const int64_t end = begin + a.strip < a.rows ? begin + a.strip : a.rows;
  float* const part =
      a.parts != nullptr ? a.parts + static_cast<int64_t>(blockIdx.x) * r.cols : nullptr;

  float dw[kChunks][kEach];
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int k = 0; k < kEach; ++k) dw[c][k] = 0.0f;
  for (int64_t first = begin; first < end; first += kGroups) {
    const int64_t row = first + group;
    const int64_t cols = row < end ? r.cols : 0;
    const auto left = [&](int64_t j) { return kWide ? kEach : cols - j; };
    const Y* const dy = static_cast<const Y*>(r.dy) + row * r.dy_stride;
    const X* const h = static_cast<const X*>(r.h) + row * r.h_stride;
    const X* const dsum = static_cast<const X*>(r.dsum) + row * r.dsum_stride;
    X* const dx = r.dx != nullptr ? static_cast<X*>(r.dx) + row * r.cols : nullptr;
    const float rstd = cols > 0 ? r.rstd[row] : 0.0f;
    const auto read = [&](int64_t j, float (&d)[kEach], float (&x)[kEach]) {
      load_some<Y, kEach>(dy + j, left(j), kWide, d);
      load_some<X, kEach>(h + j, left(j), kWide, x);
    };
    float dots = 0.0f;
    const auto dot = [&](int64_t j) {
      float d[kEach], x[kEach], w[kEach];
      read(j, d, x);
      load_weight<X, Y>(r.weight, r.weight_dtype, j, left(j), kWide, w);
#pragma unroll
      for (int k = 0; k < kEach; ++k) dots = fmaf(d[k] * w[k], x[k], dots);
    };
    if (r.dx != nullptr) for_chunks<X, kRowThreads>(cols, [&](int, int64_t j) { dot(j); }, dot);
    const float mean = row_sum<kRowThreads>(dots, memory) / static_cast<float>(r.cols);
    const float pull = -(rstd * rstd * rstd * mean);

    const auto write = [&](int64_t j, const float (&d)[kEach], const float (&x)[kEach]) {
      if (r.dx == nullptr) return;
      float w[kEach], out[kEach];
      load_weight<X, Y>(r.weight, r.weight_dtype, j, left(j), kWide, w);
#pragma unroll
      for (int k = 0; k < kEach; ++k) out[k] = fmaf(x[k], pull, d[k] * w[k] * rstd);
      if (r.dsum != nullptr) {
        float more[kEach];
        load_some<X, kEach>(dsum + j, left(j), kWide, more);
#pragma unroll
        for (int k = 0; k < kEach; ++k) out[k] += more[k];
      }
      store_some<X, kEach>(out, dx + j, left(j), kWide);
    };
    for_chunks<X, kRowThreads>(
        cols,
        [&](int c, int64_t j) {
          float d[kEach], x[kEach];
          read(j, d, x);
          write(j, d, x);
#pragma unroll
          for (int k = 0; k < kEach; ++k) dw[c][k] = fmaf(d[k] * x[k], rstd, dw[c][k]);
        },
        [&](int64_t j) {  // a whole block has the row, so nobody else has these sums
          float d[kEach], x[kEach];
          read(j, d, x);
          write(j, d, x);
          if (a.parts == nullptr) return;
          for (int k = 0; k < kEach && j + k < cols; ++k)
            part[j + k] = fmaf(d[k] * x[k], rstd, first == begin ? 0.0f : part[j + k]);
        });
  }
  if (a.parts == nullptr) return;
  if constexpr (kGroups == 1) {
    for_chunks<X, kRowThreads>(
        r.cols,
        [&](int c, int64_t j) {
          for (int k = 0; k < kEach && j + k < r.cols; ++k) part[j + k] = dw[c][k];
        },
        [](int64_t) {});
  } else {
    for (int g = 0; g < kGroups; ++g) {
      if (group == g)
        for_chunks<X, kRowThreads>(
            r.cols,
            [&](int c, int64_t j) {
              for (int k = 0; k < kEach && j + k < r.cols; ++k)
                joined[j + k] = (g == 0 ? 0.0f : joined[j + k]) + dw[c][k];
            },
            [](int64_t) {});
      __syncthreads();
    }
    for (int64_t j = threadIdx.x; j < r.cols; j += kRmsThreads) part[j] = joined[j];
  }
}

constexpr int kAddCols = 32, kAddLanes = 16;

// Column sums of `count` rows of floats: kAddLanes threads have a column.
template <class W>
__global__ void __launch_bounds__(kAddCols* kAddLanes)
    rms_norm_add_kernel(const float* parts, int64_t count, int64_t cols, W* dw) {
  TENFOLD_SHARED(float, sums, kAddCols* kAddLanes);
  const int at = static_cast<int>(threadIdx.x) % kAddCols;
  const int lane = static_cast<int>(threadIdx.x) / kAddCols;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kAddCols + at;
  float sum = 0.0f;
  if (j < cols)
    for (int64_t i = lane; i < count; i += kAddLanes) sum += parts[i * cols + j];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || j >= cols) return;
  for (int l = 1; l < kAddLanes; ++l) sum += sums[l * kAddCols + at];
  from_float(sum, dw + j);
}

template <class X>
inline bool rms_wide(Dtype dtype, const void* data, int64_t stride, int64_t cols) {
  constexpr int kEach = kRmsEach<X>;
  if (data == nullptr) return true;
  if (dtype == Dtype::f32) return wide_rows<float, kEach>(data, stride, cols);
  return wide_rows<bf16_t, kEach>(data, stride, cols);
}

// f(types of x and y)
template <class F>
inline void with_rms_types(Dtype x, Dtype y, const F& f) {
  if (x == Dtype::bf16) return f.template operator()<bf16_t, bf16_t>();
  if (x == Dtype::f16) return f.template operator()<fp16_t, fp16_t>();
  if (y == Dtype::bf16) return f.template operator()<float, bf16_t>();
  if (y == Dtype::f16) return f.template operator()<float, fp16_t>();
  f.template operator()<float, float>();
}

inline bool rms_by_warps(int64_t cols) {
  return cols <= rms_kept(32);
}
inline int64_t rms_groups(int64_t cols) {
  return rms_by_warps(cols) ? kRmsThreads / 32 : 1;
}

inline int64_t rms_blocks(int64_t rows, int64_t cols) {
  return (rows + rms_groups(cols) - 1) / rms_groups(cols);
}

// f<threads of a row, all rows may be read and written in vectors>()
template <class F>
inline void with_rms_rows(int64_t cols, bool wide, const F& f) {
  if (rms_by_warps(cols)) {
    wide ? f.template operator()<32, true>() : f.template operator()<32, false>();
  } else {
    wide ? f.template operator()<kRmsThreads, true>() : f.template operator()<kRmsThreads, false>();
  }
}

inline void launch_rms_norm(const RmsArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const RmsRows& r = a.r;
  const auto blocks = static_cast<unsigned>(rms_blocks(a.rows, r.cols));
  with_rms_types(r.x_dtype, r.y_dtype, [&]<class X, class Y>() {
    const bool wide = rms_wide<X>(r.x_dtype, r.x, r.x_stride, r.cols) &&
                      rms_wide<X>(r.x_dtype, r.residual, r.residual_stride, r.cols) &&
                      rms_wide<X>(r.x_dtype, r.sum, r.sum_stride, r.cols) &&
                      rms_wide<X>(r.y_dtype, r.y, r.y_stride, r.cols) &&
                      rms_wide<X>(r.weight_dtype, r.weight, 0, r.cols);
    with_rms_rows(r.cols, wide, [&]<int kRowThreads, bool kWide>() {
      TENFOLD_LAUNCH((rms_norm_kernel<X, Y, kRowThreads, kWide>), blocks, kRmsThreads, stream, a);
    });
  });
}

// Rows of a block. With sums for the weight few blocks, since each leaves a row of them: two for
// each processor of an H200.
inline int64_t rms_strip(int64_t rows, int64_t cols, bool of_weight) {
  constexpr int64_t kMostStrips = 264;
  const int64_t groups = rms_groups(cols);
  if (!of_weight) return groups;
  const int64_t even = (rows + kMostStrips - 1) / kMostStrips;
  return (even + groups - 1) / groups * groups;
}
inline int64_t rms_strips(int64_t rows, int64_t cols, bool of_weight) {
  const int64_t strip = rms_strip(rows, cols, of_weight);
  return strip == 0 ? 0 : (rows + strip - 1) / strip;
}

// All but strip. parts: room for rms_strips() rows of sums, or null; dw: what they
// are added to.
inline void launch_rms_norm_grad(RmsGradArgs a, void* dw, cudaStream_t stream) {
  const RmsGradRows& r = a.r;
  const bool of_weight = a.parts != nullptr;
  const int64_t strips = rms_strips(a.rows, r.cols, of_weight);
  a.strip = rms_strip(a.rows, r.cols, of_weight);
  if (strips > 0)
    with_rms_types(r.x_dtype, r.y_dtype, [&]<class X, class Y>() {
      const bool wide = rms_wide<X>(r.y_dtype, r.dy, r.dy_stride, r.cols) &&
                        rms_wide<X>(r.x_dtype, r.h, r.h_stride, r.cols) &&
                        rms_wide<X>(r.x_dtype, r.dsum, r.dsum_stride, r.cols) &&
                        rms_wide<X>(r.x_dtype, r.dx, r.cols, r.cols) &&
                        rms_wide<X>(r.weight_dtype, r.weight, 0, r.cols);
      const auto blocks = static_cast<unsigned>(strips);
      with_rms_rows(r.cols, wide, [&]<int kRowThreads, bool kWide>() {
        TENFOLD_LAUNCH((rms_norm_grad_kernel<X, Y, kRowThreads, kWide>), blocks, kRmsThreads,
                       stream, a);
      });
    });
  if (!of_weight || r.cols == 0) return;
  const auto columns = static_cast<unsigned>((r.cols + kAddCols - 1) / kAddCols);
  const auto add = [&]<class W>() {
    TENFOLD_LAUNCH(rms_norm_add_kernel<W>, columns, kAddCols * kAddLanes, stream, a.parts, strips,
                   r.cols, static_cast<W*>(dw));
  };
  if (r.weight_dtype == Dtype::f32) return add.template operator()<float>();
  if (r.weight_dtype == Dtype::bf16) return add.template operator()<bf16_t>();
  add.template operator()<fp16_t>();
}

}  // namespace tenfold::cuda
