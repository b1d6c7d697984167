// SPDX-License-Identifier: Apache-2.0
// Device code of last_token_reward and pairwise_logsigmoid. A block takes a row and a block of
// columns of it (loss/token_reward.h): their sums over the tokens, and from these its part of every
// dot product, which are added in order. Tokens are dealt to groups of threads by their distance
// from the row's first real one, so padding does not matter.
#pragma once

#include "core/block_sums.cuh"
#include "core/convert.cuh"
#include "core/vectors.cuh"
#include "loss/pair_loss.h"
#include "loss/token_reward.h"

namespace tenfold::cuda {

constexpr int kRewardThreads = 512, kRewardEach = 8;                          // columns of a thread
constexpr int kRewardColumns = static_cast<int>(kRewardBlock) / kRewardEach;  // threads of a group
constexpr int kRewardGroups = kRewardThreads / kRewardColumns;
static_assert(kRewardThreads % kRewardColumns == 0);

// A head of any dtype.
struct HeadWeights {
  const void* data;
  Dtype dtype;

  __device__ inline float operator[](int64_t i) const {
    if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
    if (dtype == Dtype::bf16) return to_float(static_cast<const bf16_t*>(data)[i]);
    return to_float(static_cast<const fp16_t*>(data)[i]);
  }
};

struct RewardArgs {
  const void* hidden;
  const uint8_t* mask;
  HeadWeights weight;  // [classes, dim]
  int64_t rows, length, dim, classes, row_stride, token_stride, mask_stride, blocks;
  PoolTokens pool;
  bool wide;      // rows of hidden may be read in wide loads
  float* pooled;  // [rows, dim]
  float* parts;   // [rows, blocks, classes]
  float* reward;  // [rows, classes]
};

// The real tokens of a row: first and last of those that are pooled, and how many those are; -1 and
// 0 if there is none. `memory`: kRewardThreads / 32 shared numbers.
struct RowTokens {
  int64_t first, last, count;
};
__device__ inline RowTokens tokens_of_row(const uint8_t* mask, int64_t length, PoolTokens pool,
                                          int64_t* memory) {
  int64_t to_end = -1, last = -1, count = 0;
  for (int64_t t = threadIdx.x; t < length; t += kRewardThreads) {
    if (mask[t] == 0) continue;
    to_end = larger(to_end, length - 1 - t), last = t, ++count;
  }
  last = block_max<kRewardThreads>(last, memory);
  if (pool == PoolTokens::last || last < 0) return {last, last, last < 0 ? 0 : 1};
  to_end = block_max<kRewardThreads>(to_end, memory);
  count = block_sum<kRewardThreads>(count, memory);
  return {length - 1 - to_end, last, count};
}

template <class T>
__global__ void __launch_bounds__(kRewardThreads) reward_parts_kernel(RewardArgs a) {
  TENFOLD_SHARED(int64_t, tokens_memory, kRewardThreads / 32);
  TENFOLD_SHARED(float, sums, kRewardGroups* static_cast<int>(kRewardBlock));
  TENFOLD_SHARED(float, dots, kRewardThreads / 32);
  const int64_t row = blockIdx.x / a.blocks, block = blockIdx.x % a.blocks;
  const uint8_t* const mask = a.mask + row * a.mask_stride;
  const RowTokens tokens = tokens_of_row(mask, a.length, a.pool, tokens_memory);
  const int group = static_cast<int>(threadIdx.x) / kRewardColumns;
  const int mine = static_cast<int>(threadIdx.x) % kRewardColumns * kRewardEach;
  const int64_t col = block * kRewardBlock + mine;
  float x[kRewardEach] = {};
  if (col < a.dim && tokens.count > 0) {
    const T* const from = static_cast<const T*>(a.hidden) + row * a.row_stride + col;
#pragma unroll 4
    for (int64_t t = tokens.first + group; t <= tokens.last; t += kRewardGroups) {
      if (mask[t] == 0) continue;
      float one[kRewardEach];
      load_some<T, kRewardEach>(from + t * a.token_stride, a.dim - col, a.wide, one);
#pragma unroll
      for (int k = 0; k < kRewardEach; ++k) x[k] += one[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kRewardEach; ++k) sums[group * kRewardBlock + mine + k] = x[k];
  __syncthreads();
  // Of a row without tokens NaN: the host cannot say it.
  const float count = tokens.count > 0 ? static_cast<float>(tokens.count) : NAN;
  for (int i = static_cast<int>(threadIdx.x); i < kRewardBlock; i += kRewardThreads) {
    float sum = sums[i];
    for (int g = 1; g < kRewardGroups; ++g) sum += sums[g * kRewardBlock + i];
    sum /= count;
    sums[i] = sum;
    const int64_t at = block * kRewardBlock + i;
    if (a.pooled != nullptr && at < a.dim) a.pooled[row * a.dim + at] = sum;
  }
  __syncthreads();
  for (int64_t c = 0; c < a.classes; ++c) {
    float dot = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < kRewardBlock; i += kRewardThreads) {
      const int64_t at = block * kRewardBlock + i;
      if (at < a.dim) dot = fmaf(sums[i], a.weight[c * a.dim + at], dot);
    }
    const float all = block_sum<kRewardThreads>(dot, dots);
    if (threadIdx.x == 0) a.parts[blockIdx.x * a.classes + c] = all;
  }
}

static __global__ void __launch_bounds__(kRewardThreads) reward_sum_kernel(RewardArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRewardThreads + threadIdx.x;
  if (i >= a.rows * a.classes) return;
  float sum = 0.0f;
  for (int64_t b = 0; b < a.blocks; ++b)
    sum += a.parts[(i / a.classes * a.blocks + b) * a.classes + i % a.classes];
  a.reward[i] = sum;
}

inline int64_t reward_blocks(int64_t dim) {
  return (dim + kRewardBlock - 1) / kRewardBlock;
}

// All but blocks and wide; parts are the rewards where there is one block.
template <class T>
void launch_reward(RewardArgs a, cudaStream_t stream) {
  if (a.rows == 0 || a.classes == 0) return;
  a.blocks = reward_blocks(a.dim);
  a.wide = wide_rows<T, kRewardEach>(a.hidden, a.token_stride, a.dim) &&
           wide_rows<T, kRewardEach>(a.hidden, a.row_stride, a.dim);
  if (a.blocks == 1) a.parts = a.reward;
  TENFOLD_LAUNCH(reward_parts_kernel<T>, static_cast<unsigned>(a.rows * a.blocks), kRewardThreads,
                 stream, a);
  if (a.blocks > 1)
    TENFOLD_LAUNCH(
        reward_sum_kernel,
        static_cast<unsigned>((a.rows * a.classes + kRewardThreads - 1) / kRewardThreads),
        kRewardThreads, stream, a);
}

constexpr int64_t kRewardTokens = 64;  // of a block of grad_hidden

struct RewardGradArgs {
  const float *grad, *pooled;  // [rows, classes], [rows, dim]
  const uint8_t* mask;
  HeadWeights weight;
  int64_t rows, length, dim, classes, mask_stride, tiles;
  PoolTokens pool;
  bool wide;
  void* out;  // [rows, length, dim], or [classes, dim]
};

// A block: a row and some tokens. All tokens that count have one gradient.
template <class T>
__global__ void __launch_bounds__(kRewardThreads) reward_hidden_kernel(RewardGradArgs a) {
  TENFOLD_SHARED(int64_t, memory, kRewardThreads / 32);
  const int64_t row = blockIdx.x / a.tiles, begin = blockIdx.x % a.tiles * kRewardTokens;
  const int64_t end = a.length - begin < kRewardTokens ? a.length : begin + kRewardTokens;
  const uint8_t* const mask = a.mask + row * a.mask_stride;
  const RowTokens tokens = tokens_of_row(mask, a.length, a.pool, memory);
  const auto count = static_cast<float>(tokens.count);
  const bool some = tokens.count > 0 && tokens.first < end && tokens.last >= begin;
  for (int64_t col = threadIdx.x * kRewardEach; col < a.dim; col += kRewardThreads * kRewardEach) {
    float x[kRewardEach] = {};
    for (int64_t c = 0; some && c < a.classes; ++c) {
      const float by = a.grad[row * a.classes + c] / count;
#pragma unroll
      for (int k = 0; k < kRewardEach; ++k)
        if (col + k < a.dim) x[k] = fmaf(by, a.weight[c * a.dim + col + k], x[k]);
    }
    for (int64_t t = begin; t < end; ++t) {
      const bool counts = some && t >= tokens.first && t <= tokens.last && mask[t] != 0;
      float y[kRewardEach];
#pragma unroll
      for (int k = 0; k < kRewardEach; ++k) y[k] = counts ? x[k] : 0.0f;
      T* const to = static_cast<T*>(a.out) + (row * a.length + t) * a.dim + col;
      store_some<T, kRewardEach>(y, to, a.dim - col, a.wide);
    }
  }
}

template <class T>
void launch_reward_hidden(RewardGradArgs a, cudaStream_t stream) {
  if (a.rows == 0 || a.length == 0) return;
  a.tiles = (a.length + kRewardTokens - 1) / kRewardTokens;
  a.wide = wide_rows<T, kRewardEach>(a.out, a.dim, a.dim);
  TENFOLD_LAUNCH(reward_hidden_kernel<T>, static_cast<unsigned>(a.rows * a.tiles), kRewardThreads,
                 stream, a);
}

// A thread a column of a class.
template <class T>
__global__ void __launch_bounds__(kRewardThreads) reward_weight_kernel(RewardGradArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRewardThreads + threadIdx.x;
  if (i >= a.classes * a.dim) return;
  float sum = 0.0f;
  for (int64_t row = 0; row < a.rows; ++row)
    sum = fmaf(a.grad[row * a.classes + i / a.dim], a.pooled[row * a.dim + i % a.dim], sum);
  from_float(sum, static_cast<T*>(a.out) + i);
}

template <class T>
void launch_reward_weight(const RewardGradArgs& a, cudaStream_t stream) {
  const int64_t all = a.classes * a.dim;
  if (all > 0)
    TENFOLD_LAUNCH(reward_weight_kernel<T>,
                   static_cast<unsigned>((all + kRewardThreads - 1) / kRewardThreads),
                   kRewardThreads, stream, a);
}

constexpr int kPairThreads = 512;

struct PairArgs {
  const void *pos, *neg;
  const float* margin;  // or null
  int64_t pairs;
  float center;
  float *loss, *delta;
  float *of_pos, *of_neg;  // or null
};

// One block.
template <class T>
__global__ void __launch_bounds__(kPairThreads) pair_loss_kernel(PairArgs a) {
  TENFOLD_SHARED(double, memory, kPairThreads / 32);
  double sum = 0.0;
  const float share = 1.0f / static_cast<float>(a.pairs);
  for (int64_t i = threadIdx.x; i < a.pairs; i += kPairThreads) {
    const float pos = to_float(static_cast<const T*>(a.pos)[i]);
    const float neg = to_float(static_cast<const T*>(a.neg)[i]);
    a.delta[i] = pos - neg;
    const PairTerm t = pair_term(pos, neg, a.margin != nullptr ? a.margin[i] : 0.0f, a.center);
    sum += t.loss;
    if (a.of_pos == nullptr) continue;
    a.of_pos[i] = share * (t.level + t.slope);
    a.of_neg[i] = share * (t.level - t.slope);
  }
  sum = block_sum<kPairThreads>(sum, memory);
  if (threadIdx.x == 0) *a.loss = static_cast<float>(sum / static_cast<double>(a.pairs));
}

template <class T>
void launch_pair_loss(const PairArgs& a, cudaStream_t stream) {
  TENFOLD_LAUNCH(pair_loss_kernel<T>, 1, kPairThreads, stream, a);
}

}  // namespace tenfold::cuda
