// SPDX-License-Identifier: Apache-2.0
// The two ends of t5_attention's bias: from the table to a float per head and distance within its
// reach, and from the sums of dS by distance to the gradient of the table.
#pragma once

#include "attention/cuda/prefill_launch.h"
#include "attention/t5_attention.h"
#include "core/block_sums.cuh"

namespace tenfold::cuda {

struct T5Bias {
  RelativeBuckets buckets;
  AttentionBias table;  // strides: head and row (a bucket)
  int64_t heads;
};

__global__ void __launch_bounds__(128) t5_lut_kernel(T5Bias bias, float* lut) {
  const int64_t reach = bucket_reach(bias.buckets), width = 2 * reach + 1;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (i >= bias.heads * width) return;
  const int32_t bucket = bucket_of(bias.buckets, i % width - reach);
  lut[i] = bias_at(bias.table, i / width * bias.table.head + bucket * bias.table.row);
}

// A block for each (bucket, head): the sums of its distances, in a fixed order.
struct T5Sums {
  RelativeBuckets buckets;
  const float* sums;  // as BackwardArgs::sums
  int64_t heads, of_head, pitch;
  float* dtable;  // [num_buckets, H]
};

__global__ void __launch_bounds__(128) t5_table_kernel(T5Sums s) {
  TENFOLD_SHARED(float, memory, 4);
  const int64_t head = blockIdx.x % s.heads;
  const auto bucket = static_cast<int32_t>(blockIdx.x / s.heads);
  const RelativeRange at = bucket_range(s.buckets, bucket, s.pitch / 2);
  const int64_t width = at.last - at.first;
  const float* const from = s.sums + head * s.of_head * s.pitch + s.pitch / 2 + at.first;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < width * s.of_head; i += 128)
    sum += from[i / width * s.pitch + i % width];
  sum = block_sum<128>(sum, memory);
  if (threadIdx.x == 0) s.dtable[blockIdx.x] = sum;
}

inline int64_t t5_lut_floats(const T5Bias& bias) {
  return bias.heads * (2 * bucket_reach(bias.buckets) + 1);
}

inline void launch_t5_lut(const T5Bias& bias, float* lut, cudaStream_t stream) {
  const int64_t count = t5_lut_floats(bias);
  if (count > 0)
    TENFOLD_LAUNCH(t5_lut_kernel, static_cast<unsigned>((count + 127) / 128), 128, stream, bias,
                   lut);
}

inline void launch_t5_table(const T5Sums& s, cudaStream_t stream) {
  const int64_t blocks = s.buckets.count * s.heads;
  if (blocks > 0) TENFOLD_LAUNCH(t5_table_kernel, static_cast<unsigned>(blocks), 128, stream, s);
}

}  // namespace tenfold::cuda
