// SPDX-License-Identifier: Apache-2.0
// Device code of grad_norm: a sum of squares per chunk, then one block adds the chunks in a fixed
// order. Squares of a vector are added in float32, all else in float64: memory is the limit.
#pragma once

#include "optim/cuda/tensor_list.cuh"

namespace tenfold::cuda {

__device__ inline double block_sum(double x, double* sums) {  // complete in thread 0
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kListThreads / 32; ++warp) total += sums[warp];
  return total;
}

template <class T>
__device__ inline double square_sum_of(const Listed& t, int64_t begin, int64_t end) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  const T* g = static_cast<const T*>(t.from);
  double total = 0.0;
#pragma unroll 4
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kPer; i < end;
       i += kListThreads * kPer) {
    const int n = static_cast<int>(end - i < kPer ? end - i : kPer);
    const uint32_t bits = trained_bits<kPer>(t.mask, i, n);
    if (bits == 0) continue;
    T x[kPer];
    if (t.vectors && n == kPer) {
      const uint4 words = *reinterpret_cast<const uint4*>(g + i);
      memcpy(x, &words, sizeof(x));
    } else {
      for (int k = 0; k < kPer; ++k) x[k] = k < n ? g[i + k] : T{};
    }
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      const float value = (bits >> k & 1u) != 0 ? to_float(x[k]) : 0.0f;
      sum = fmaf(value, value, sum);
    }
    total += sum;
  }
  return total;
}

__global__ void __launch_bounds__(kListThreads)
    square_sum_kernel(TensorList list, double* sums_of_chunks) {
  TENFOLD_SHARED(double, sums, kListThreads / 32);
  const uint32_t chunk = blockIdx.x;
  const int at = find_listed(list, chunk);
  const Listed& t = list.tensor[at];
  const int64_t begin = static_cast<int64_t>(chunk - list.first[at]) * kListChunk;
  const int64_t end = begin + kListChunk < t.numel ? begin + kListChunk : t.numel;
  const auto dtype = static_cast<Dtype>(t.dtype);
  const double sum = dtype == Dtype::f32    ? square_sum_of<float>(t, begin, end)
                     : dtype == Dtype::bf16 ? square_sum_of<bf16_t>(t, begin, end)
                                            : square_sum_of<fp16_t>(t, begin, end);
  const double total = block_sum(sum, sums);
  if (threadIdx.x == 0) sums_of_chunks[list.chunks + chunk] = total;
}

// scale_tensor null: `scale`.
__global__ void __launch_bounds__(kListThreads)
    norm_kernel(const double* sums_of_chunks, int64_t chunks, double scale,
                const float* scale_tensor, float* norm) {
  TENFOLD_SHARED(double, sums, kListThreads);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kListThreads) sum += sums_of_chunks[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kListThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  if (scale_tensor != nullptr) scale = *scale_tensor;
  *norm = static_cast<float>(sqrt(sums[0]) / fabs(scale));
}

// tensor(i): Listed i of n. sums: one number per chunk of all tensors.
template <class TensorAt>
void launch_grad_norm(int64_t n, TensorAt tensor, double* sums, int64_t chunks, double scale,
                      const float* scale_tensor, float* norm, cudaStream_t stream) {
  launch_lists(n, tensor, [&](const TensorList& list, uint32_t blocks) {
    TENFOLD_LAUNCH(square_sum_kernel, blocks, kListThreads, stream, list, sums);
  });
  TENFOLD_LAUNCH(norm_kernel, 1, kListThreads, stream, static_cast<const double*>(sums), chunks,
                 scale, scale_tensor, norm);
}

}  // namespace tenfold::cuda
