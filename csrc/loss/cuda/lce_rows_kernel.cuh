// SPDX-License-Identifier: Apache-2.0
// What linear_cross_entropy does row by row on the device. The rows that count are packed first, in
// order; how many there are is never known to the host: grids are made for all rows, and blocks
// beyond `count` leave.
#pragma once

#include "core/convert.cuh"
#include "loss/cuda/softmax.cuh"
#include "loss/linear_cross_entropy.h"

namespace tenfold::cuda {

constexpr int kRowsThreads = 1024;  // of the kernels that are one block

struct LceState {
  int64_t count;
  double weight;     // sum of the weights of the rows that count
  float grad_scale;  // of the weight's: power of two by which gradients of logits are multiplied
};

// A row that counts. Slopes as in RowSlopes, times 1 / temperature and grad_scale, the row's own
// power of two.
struct alignas(16) LceRow {
  float lse, entropy, of_p, of_id, of_entropy;
  int target;
  float grad_scale, to_weight;  // to_weight: the state's grad_scale over the row's
};

// Rows that count, packed; room for all rows, and whole tiles more of `row`.
struct PackedRows {
  LceState* state;
  int *row, *target;       // row of hidden; in [0, vocab), else -1
  float *weight, *chosen;  // softcapped logit of the target
  int* place;              // [N], of every row of hidden: where it is packed, or -1
  LceRow* slopes;          // of the backward pass
};

struct CountArgs {
  PackedRows to;
  int64_t rows, vocab;
  IntArray target;
  const float* row_weight;  // or null: 1
  bool ids;                 // rows count whose target is in [0, vocab); else all but ignore_index
  int64_t ignore_index;
  float* zeroed[3];  // or null: [N], 0 where the row does not count
};

// Bits of the warp's rows that count.
__device__ inline uint32_t counted_bits(const CountArgs& a, int64_t i, int64_t end, int64_t* target,
                                        float* weight) {
  bool counts = i < end;
  *target = counts ? a.target[i] : 0;
  *weight = counts && a.row_weight != nullptr ? a.row_weight[i] : 1.0f;
  const bool inside = *target >= 0 && *target < a.vocab;
  counts &= a.ids ? inside : *target != a.ignore_index && *weight != 0.0f;
  if (!inside) *target = -1;
  return __ballot_sync(0xFFFFFFFFu, counts);
}

// One block; a warp takes a part of the rows: counts, then packs.
static __global__ void __launch_bounds__(kRowsThreads) count_rows_kernel(CountArgs a) {
  constexpr int kWarps = kRowsThreads / 32;
  TENFOLD_SHARED(int64_t, counts, kWarps);
  TENFOLD_SHARED(double, weights, kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t each = (a.rows + kRowsThreads - 1) / kRowsThreads * 32;
  const int64_t begin = warp * each < a.rows ? warp * each : a.rows;
  const int64_t end = begin + each < a.rows ? begin + each : a.rows;
  int64_t count = 0, target;
  float weight;
  double total = 0.0;
#pragma unroll 4
  for (int64_t i = begin; i < end; i += 32) {
    const uint32_t bits = counted_bits(a, i + lane, end, &target, &weight);
    count += __popc(bits);
    if ((bits >> lane & 1u) != 0) total += weight;
  }
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, step);
  if (lane == 0) counts[warp] = count, weights[warp] = total;
  __syncthreads();
  int64_t at = 0, all = 0;
  total = 0.0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) at += counts[w];
    all += counts[w];
    total += weights[w];
  }
  if (threadIdx.x == 0) *a.to.state = {all, total, 1.0f};
  for (int64_t i = begin; i < end; i += 32) {
    const uint32_t bits = counted_bits(a, i + lane, end, &target, &weight);
    const bool counts_here = (bits >> lane & 1u) != 0;
    const int64_t to = at + __popc(bits & ((1u << lane) - 1u));
    at += __popc(bits);
    if (i + lane >= end) continue;
    a.to.place[i + lane] = counts_here ? static_cast<int>(to) : -1;
    if (counts_here) {
      a.to.row[to] = static_cast<int>(i + lane);
      a.to.target[to] = static_cast<int>(target);
      a.to.weight[to] = weight;
      // Stays so where the target is out of range: the host cannot say it.
      a.to.chosen[to] = NAN;
    } else {
      for (float* const out : a.zeroed)
        if (out != nullptr) out[i + lane] = 0.0f;
    }
  }
}

// Of a row and a range of the vocabulary: maximum of the softcapped logits, sums as in LogitSums
// relative to it.
struct RangeSums {
  float max, sum, weighted;
};

struct JoinArgs {
  PackedRows rows;
  int64_t first;  // of the rows that count
  int ranges;
  const RangeSums* parts;  // [rows from first][ranges]
  double scale;            // 1 / temperature
  float z_loss;
  float *lse, *logp, *entropy, *loss;  // [N] of all rows, or null; loss with its weight
  float* nll;                          // the same without it
  float* packed_loss;                  // of the rows that count, or null
};

constexpr int kJoinRowsThreads = 128;

// A warp a row: joins its ranges in a fixed order.
static __global__ void __launch_bounds__(kJoinRowsThreads) join_ranges_kernel(JoinArgs a) {
  const int64_t warp =
      static_cast<int64_t>(blockIdx.x) * (kJoinRowsThreads / 32) + threadIdx.x / 32;
  const int64_t at = a.first + warp;
  if (at >= a.rows.state->count) return;
  const RangeSums* const parts = a.parts + warp * a.ranges;
  const LogitSums all = join_in_warp(a.ranges, [&](int i) {
    return LogitSums{parts[i].max * a.scale, parts[i].sum, parts[i].weighted};
  });
  if (threadIdx.x % 32 != 0) return;
  const int64_t row = a.rows.row[at];
  const double log_sum = all.max == INFINITY ? 0.0 : log(all.sum);
  const auto lse = static_cast<float>(all.max + log_sum);
  const auto logp = static_cast<float>(a.rows.chosen[at] * a.scale - all.max - log_sum);
  a.lse[row] = lse;
  if (a.logp != nullptr) a.logp[row] = logp;
  if (a.nll != nullptr) a.nll[row] = -logp;
  if (a.entropy != nullptr) a.entropy[row] = static_cast<float>(log_sum - all.weighted / all.sum);
  const double wide = lse;
  const auto loss = static_cast<float>(a.rows.weight[at] * (a.z_loss * wide * wide - logp));
  if (a.loss != nullptr) a.loss[row] = loss;
  if (a.packed_loss != nullptr) a.packed_loss[at] = loss;
}

// What a mean or a sum is divided by.
__device__ inline double loss_divisor(const LceState& s, bool mean) {
  return mean && s.count > 0 ? s.weight : 1.0;
}

// One block: the sum of the rows' losses in a fixed order, divided. weight: or null, where to write
// the sum of the rows' weights.
static __global__ void __launch_bounds__(kRowsThreads)
    total_loss_kernel(const LceState* state, const float* losses, bool mean, float* loss,
                      float* weight) {
  TENFOLD_SHARED(double, sums, kRowsThreads);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < state->count; i += kRowsThreads) sum += losses[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kRowsThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  *loss = static_cast<float>(sums[0] / loss_divisor(*state, mean));
  if (weight != nullptr) *weight = static_cast<float>(state->weight);
}

// Upstream gradients, of all rows; null is 0.
struct SlopesArgs {
  PackedRows rows;
  const float *lse, *entropy;  // entropy null: of a loss, else of a log-probability
  const float *grad_loss, *grad_logp, *grad_lse, *grad_entropy;
  const float* grad_nll;  // of the losses without their weights, beside grad_loss
  bool loss_is_one;       // grad_loss is 1
  bool each, mean;        // grad_loss is of every row; of the mean
  float z_loss, scale;    // 1 / temperature
  bool small;             // gradients of the logits are kept in float16: they need its range
};

__device__ inline RowSlopes row_slopes(const SlopesArgs& a, double of_loss, int64_t at) {
  const int64_t row = a.rows.row[at];
  const auto grad = [&](const float* of) { return of != nullptr ? of[row] : 0.0f; };
  const float lse = a.lse[row];
  RowSlopes s;
  if (a.entropy != nullptr) {
    s = logprob_slopes(grad(a.grad_logp), grad(a.grad_entropy), grad(a.grad_lse), a.entropy[row]);
  } else {
    const float mine = a.each ? grad(a.grad_loss) : static_cast<float>(of_loss);
    const float all = mine * a.rows.weight[at] + grad(a.grad_nll);
    s = loss_slopes(all, grad(a.grad_lse), lse, a.z_loss);
  }
  if (a.rows.target[at] < 0) s.of_p = NAN;
  return s;
}

__device__ inline float largest(const RowSlopes& s) {
  return fmaxf(fabsf(s.of_p), fmaxf(fabsf(s.of_id), fabsf(s.of_entropy)));
}

// A power of two that brings x to 64 to 128, of float16's 65504: there is room above for what
// entropies add, and below for small probabilities.
__device__ inline float grad_scale_of(float x) {
  const int exponent = static_cast<int>(float_to_bits(x) >> 23) - 127;
  if (exponent < -110 || exponent > 110) return 1.0f;
  return bits_to_float(static_cast<uint32_t>(127 + 6 - exponent) << 23);
}

// One block.
static __global__ void __launch_bounds__(kRowsThreads) slopes_kernel(SlopesArgs a) {
  TENFOLD_SHARED(float, tops, kRowsThreads / 32);
  const LceState& state = *a.rows.state;
  const double up = a.loss_is_one ? 1.0 : a.grad_loss != nullptr && !a.each ? *a.grad_loss : 0.0;
  const double of_loss = up / loss_divisor(state, a.mean);
  float scale_of_all = 1.0f;
  if (a.small) {
    float top = 0.0f;
    for (int64_t i = threadIdx.x; i < state.count; i += kRowsThreads)
      top = fmaxf(top, largest(row_slopes(a, of_loss, i)));
    for (int step = 16; step > 0; step /= 2)
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (int w = 0; w < kRowsThreads / 32; ++w) top = fmaxf(top, tops[w]);
    scale_of_all = grad_scale_of(top * a.scale);
    if (threadIdx.x == 0) a.rows.state->grad_scale = scale_of_all;
  }
  for (int64_t i = threadIdx.x; i < state.count; i += kRowsThreads) {
    const RowSlopes s = row_slopes(a, of_loss, i);
    const float own = a.small ? grad_scale_of(largest(s) * a.scale) : 1.0f, factor = a.scale * own;
    const int64_t row = a.rows.row[i];
    const float entropy = a.entropy != nullptr ? a.entropy[row] : 0.0f;
    a.rows.slopes[i] = {
        a.lse[row],       entropy, s.of_p * factor,   s.of_id * factor, s.of_entropy * factor,
        a.rows.target[i], own,     scale_of_all / own};
  }
}

struct StoreHiddenArgs {
  PackedRows rows;
  const float* sums;  // [rows that count][dim]
  int64_t dim;
  void* out;  // [N, dim]
};

constexpr int kStoreThreads = 128;

// A block a row of grad_hidden: what was summed, or zeros.
template <class T>
__global__ void __launch_bounds__(kStoreThreads) store_hidden_kernel(StoreHiddenArgs a) {
  const int64_t row = blockIdx.x;
  const int place = a.rows.place[row];
  const float factor = place >= 0 ? 1.0f / a.rows.slopes[place].grad_scale : 0.0f;
  T* const out = static_cast<T*>(a.out) + row * a.dim;
  const float* const sums = a.sums + (place >= 0 ? place : 0) * a.dim;
  for (int64_t i = threadIdx.x; i < a.dim; i += kStoreThreads)
    from_float(place >= 0 ? sums[i] * factor : 0.0f, out + i);
}

}  // namespace tenfold::cuda
