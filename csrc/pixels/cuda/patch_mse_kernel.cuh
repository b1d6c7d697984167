// SPDX-License-Identifier: Apache-2.0
// Device code of patch_mse and its gradient. The weights' sum first, in a few blocks; then a warp a
// patch, whose target is rebuilt in registers from integer sums; one block adds what the blocks
// left, in order. No atomics: the same bits every time.
#pragma once

#include "pixels/cuda/patch_values.cuh"

namespace tenfold::cuda {

constexpr int kErrorsEach = 4;  // patches of a warp, one after the other
constexpr int kErrorsBlock = kPatchWarps * kErrorsEach;
constexpr int kWeightBlocks = 64;  // at most, whose sums every block with gradients adds up again

struct MseArgs {
  PatchMse m;
  const float* denom;       // as given, or null
  const float* grad_loss;   // null: 1
  bool made;                // see MseCall
  float *loss, *denom_out;  // null: not asked for
  // Working memory: kWeightBlocks, and mse_blocks numbers.
  double *of_weights, *of_errors;
  // Set by the launch.
  int weight_blocks;
  bool vectors, wide;
};

inline int64_t mse_blocks(const PatchMse& m) {
  return patch_blocks(m.grid.images * m.grid.length(), kErrorsEach);
}

// Of a block, in thread 0.
__device__ inline double total_of_warps(double of_lane, double* shared) {
  const double mine = warp_sum(of_lane);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kPatchWarps; ++w) total += shared[w];
  return total;
}

static __global__ void __launch_bounds__(kPatchThreads) weight_sums_kernel(MseArgs a) {
  TENFOLD_SHARED(double, sums, kPatchWarps);
  const auto length = static_cast<uint32_t>(a.m.grid.length());
  const int64_t count = a.m.grid.images * a.m.grid.length();
  double sum = 0.0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPatchThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(a.weight_blocks) * kPatchThreads)
    if (static_cast<uint32_t>(i) % length >= a.m.shift) sum += a.m.weights[i];
  const double total = total_of_warps(sum, sums);
  if (threadIdx.x == 0) a.of_weights[blockIdx.x] = total;
}

// In all lanes; rounded as it is given back.
__device__ inline double denom_of(const MseArgs& a) {
  if (a.denom != nullptr) return *a.denom;
  double sum = 0.0;
  for (int i = static_cast<int>(threadIdx.x % 32); i < a.weight_blocks; i += 32)
    sum += a.of_weights[i];
  return static_cast<float>(warp_sum(sum));
}

template <class T>
__device__ inline T* position_row(const PatchRows& rows, int64_t image, int64_t position) {
  return static_cast<T*>(rows.data) + image * rows.image_step + position * rows.row_step;
}

// Of 16 bits a lane has the words of pred under way while the patch is summed; of 32 there are not
// the registers.
template <class T, bool kHeld>
constexpr bool kPredHeld = kHeld && sizeof(T) == 2;

// Blocks of a multiprocessor that leave a thread the registers it needs: 128, or 64.
template <bool kHeld>
constexpr int kLeastBlocks = kHeld ? 2 : 4;

template <class T, bool kGrad, bool kHeld>
__device__ inline double patch_error(const MseArgs& a, const T* f, int64_t offset, float slope,
                                     T* grad) {
  constexpr int kN = kPerVector<T>;
  const int64_t n = a.m.grid.values();
  constexpr bool kWords = kPredHeld<T, kHeld>;
  uint4 pred[kWords ? kHeldValues / kN : 1];
  const int lane = static_cast<int>(threadIdx.x % 32);
  if constexpr (kWords) {
#pragma unroll
    for (int v = 0; v < kHeldValues / kN; ++v) {
      const int64_t k = static_cast<int64_t>(v * 32 + lane) * kN;
      if (k < n) pred[v] = *reinterpret_cast<const uint4*>(f + k);
    }
  }
  const PatchReader<kN> reader{&a.m.grid, a.m.grid.box, offset, a.vectors};
  const LaneValues<kN, kHeld> values(reader, n);
  const ValueRule target(values, a.m.normalize, a.m.eps);
  double total = 0.0;
  values.each([&](int v, int64_t k, const float (&x)[kN]) {
    float y[kN], sum = 0.0f;
    if constexpr (kWords) {
      to_floats<T>(pred[v], y);
    } else {
      load_some<T, kN>(f + k, n - k, a.wide, y);
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float e = kHeld || k + j < n ? y[j] - target(x[j]) : 0.0f;
      sum = fmaf(e, e, sum);
      y[j] = e * slope;
    }
    total += sum;
    if constexpr (kGrad) store_some<T, kN>(y, grad + k, n - k, a.wide);
  });
  return warp_sum(total) / static_cast<double>(n);
}

template <class T, bool kGrad, bool kHeld>
__global__ void __launch_bounds__(kPatchThreads, kLeastBlocks<kHeld>) patch_mse_kernel(MseArgs a) {
  constexpr int kN = kPerVector<T>;
  TENFOLD_SHARED(double, sums, kPatchWarps);
  const PatchMse& m = a.m;
  const float by = a.grad_loss != nullptr ? *a.grad_loss : 1.0f;
  if (a.made && by == 1.0f) return;
  const int64_t n = m.grid.values(), length = m.grid.length(), count = m.grid.images * length;
  const double slope = kGrad ? error_slope(by, n, denom_of(a)) : 0.0;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kErrorsBlock;
  const int lane = static_cast<int>(threadIdx.x % 32);
  double total = 0.0;
  for (int j = 0; j < kErrorsEach; ++j) {
    const int64_t i = begin + j * kPatchWarps + threadIdx.x / 32;
    if (i >= count) break;
    const int64_t image = static_cast<uint32_t>(i) / static_cast<uint32_t>(length);
    const int64_t position = i - image * length;
    const double weight = m.has_target(position) ? m.weights[i + m.shift] : 0.0;
    T* const grad = kGrad ? position_row<T>(m.grad, image, position) : nullptr;
    double error = 0.0;
    if (weight != 0.0) {
      error = patch_error<T, kGrad, kHeld>(a, position_row<T>(m.pred, image, position),
                                           m.grid.offset(image, position + m.shift),
                                           static_cast<float>(slope * weight), grad);
      total += weight * error;
    } else if constexpr (kGrad) {
      const float zeros[kN] = {};
      for (int64_t k = static_cast<int64_t>(lane) * kN; k < n; k += 32 * kN)
        store_some<T, kN>(zeros, grad + k, n - k, a.wide);
    }
    if (lane == 0 && m.per_patch != nullptr) m.per_patch[i] = static_cast<float>(error);
  }
  if (a.of_errors == nullptr) return;
  const double all = total_of_warps(lane == 0 ? total : 0.0, sums);
  if (threadIdx.x == 0) a.of_errors[blockIdx.x] = all;
}

static __global__ void __launch_bounds__(kPatchThreads)
    finish_mse_kernel(MseArgs a, int64_t blocks) {
  TENFOLD_SHARED(double, sums, kPatchWarps);
  const double denom = denom_of(a);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += kPatchThreads) sum += a.of_errors[i];
  const double total = total_of_warps(sum, sums);
  if (threadIdx.x != 0) return;
  *a.loss = denom > 0.0 ? static_cast<float>(total / denom) : 0.0f;
  *a.denom_out = static_cast<float>(denom);
}

template <class T>
inline bool wide_patches(const PatchRows& rows, int64_t n) {
  constexpr int kN = kPerVector<T>;
  return rows.data == nullptr || (wide_rows<T, kN>(rows.data, rows.row_step, n) &&
                                  wide_rows<T, kN>(rows.data, rows.image_step, n));
}

template <class T>
void launch_mse(MseArgs a, cudaStream_t stream) {
  const int64_t n = a.m.grid.values(), blocks = mse_blocks(a.m);
  a.vectors = in_vectors<kPerVector<T>>(a.m.grid, a.m.grid.box);
  a.wide = wide_patches<T>(a.m.pred, n) && wide_patches<T>(a.m.grad, n);
  const int64_t of_weights =
      (a.m.grid.images * a.m.grid.length() + kPatchThreads - 1) / kPatchThreads;
  a.weight_blocks = static_cast<int>(of_weights < kWeightBlocks ? of_weights : kWeightBlocks);
  if (a.denom == nullptr && a.weight_blocks > 0)
    TENFOLD_LAUNCH(weight_sums_kernel, a.weight_blocks, kPatchThreads, stream, a);
  if (blocks > 0) {
    const auto grid = static_cast<unsigned>(blocks);
    const bool held = a.wide && n <= 32 * kHeldValues;
    const auto launch = [&]<bool kGrad, bool kHeld>() {
      TENFOLD_LAUNCH((patch_mse_kernel<T, kGrad, kHeld>), grid, kPatchThreads, stream, a);
    };
    if (a.m.grad.data != nullptr) {
      held ? launch.template operator()<true, true>() : launch.template operator()<true, false>();
    } else {
      held ? launch.template operator()<false, true>() : launch.template operator()<false, false>();
    }
  }
  if (a.loss != nullptr) TENFOLD_LAUNCH(finish_mse_kernel, 1, kPatchThreads, stream, a, blocks);
}

}  // namespace tenfold::cuda
