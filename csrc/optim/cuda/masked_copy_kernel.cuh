// SPDX-License-Identifier: Apache-2.0
// Device code of masked_copy_: a thread moves 16 bytes, or, where the dtype changes, as many
// elements. A vector that is chosen in part is written back whole: no other thread touches it.
#pragma once

#include "optim/cuda/tensor_list.cuh"

namespace tenfold::cuda {

// One dtype, elements of sizeof(T) bytes.
template <class T>
__global__ void __launch_bounds__(kListThreads) masked_copy_kernel(TensorList list) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  const uint32_t chunk = blockIdx.x;
  const int at = find_listed(list, chunk);
  const Listed& t = list.tensor[at];
  const int64_t begin = static_cast<int64_t>(chunk - list.first[at]) * kListChunk;
  const int64_t end = begin + kListChunk < t.numel ? begin + kListChunk : t.numel;
  const T* from = static_cast<const T*>(t.from);
  T* to = static_cast<T*>(t.to);
#pragma unroll 4
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kPer; i < end;
       i += kListThreads * kPer) {
    const int n = static_cast<int>(end - i < kPer ? end - i : kPer);
    const uint32_t bits = trained_bits<kPer>(t.mask, i, n);
    if (bits == 0) continue;
    if (!t.vectors || n < kPer) {
      for (int k = 0; k < n; ++k)
        if ((bits >> k & 1u) != 0) to[i + k] = from[i + k];
      continue;
    }
    uint4 words = *reinterpret_cast<const uint4*>(from + i);
    if (bits != (1u << kPer) - 1u) {
      const uint4 old = *reinterpret_cast<const uint4*>(to + i);
      T x[kPer], y[kPer];
      memcpy(x, &words, sizeof(x));
      memcpy(y, &old, sizeof(y));
#pragma unroll
      for (int k = 0; k < kPer; ++k)
        if ((bits >> k & 1u) == 0) x[k] = y[k];
      memcpy(&words, x, sizeof(x));
    }
    *reinterpret_cast<uint4*>(to + i) = words;
  }
}

template <class To>
__device__ inline void round_to(const Listed& t, int64_t i, To* to) {
  const auto dtype = static_cast<Dtype>(t.dtype);
  const float x = dtype == Dtype::f32    ? static_cast<const float*>(t.from)[i]
                  : dtype == Dtype::bf16 ? to_float(static_cast<const bf16_t*>(t.from)[i])
                                         : to_float(static_cast<const fp16_t*>(t.from)[i]);
  from_float(x, to);
}

// From the dtype of each tensor's source to To.
template <class To>
__global__ void __launch_bounds__(kListThreads) masked_round_kernel(TensorList list) {
  const uint32_t chunk = blockIdx.x;
  const int at = find_listed(list, chunk);
  const Listed& t = list.tensor[at];
  const int64_t begin = static_cast<int64_t>(chunk - list.first[at]) * kListChunk;
  const int64_t end = begin + kListChunk < t.numel ? begin + kListChunk : t.numel;
  for (int64_t i = begin + threadIdx.x; i < end; i += kListThreads)
    if (trained_bits<1>(t.mask, i, 1) != 0) round_to(t, i, static_cast<To*>(t.to) + i);
}

// Tensors of which source and destination have one dtype, of `size` = 1, 2, 4 or 8 bytes.
template <class TensorAt>
void launch_masked_copy(int64_t n, TensorAt tensor, int64_t size, cudaStream_t stream) {
  launch_lists(n, tensor, [&](const TensorList& list, uint32_t blocks) {
    if (size == 1) TENFOLD_LAUNCH(masked_copy_kernel<uint8_t>, blocks, kListThreads, stream, list);
    if (size == 2) TENFOLD_LAUNCH(masked_copy_kernel<uint16_t>, blocks, kListThreads, stream, list);
    if (size == 4) TENFOLD_LAUNCH(masked_copy_kernel<uint32_t>, blocks, kListThreads, stream, list);
    if (size == 8) TENFOLD_LAUNCH(masked_copy_kernel<uint64_t>, blocks, kListThreads, stream, list);
  });
}

// Tensors that are rounded to To.
template <class To, class TensorAt>
void launch_masked_round(int64_t n, TensorAt tensor, cudaStream_t stream) {
  launch_lists(n, tensor, [&](const TensorList& list, uint32_t blocks) {
    TENFOLD_LAUNCH(masked_round_kernel<To>, blocks, kListThreads, stream, list);
  });
}

}  // namespace tenfold::cuda
