// SPDX-License-Identifier: Apache-2.0
// Device code of ma_ppo_prepare: rewards, pooling, GAE and broadcast of a row by one block, in one
// launch. Three sweeps over the row's tokens (where segments begin; segmented sums; broadcast) and
// one, backwards, over its macro actions. What is between them stays in shared memory; of rows too
// long for that, in adv_m, ret_m and `spare`, which the second cache holds.
#pragma once

#include "rl/cuda/gae_kernel.cuh"
#include "rl/cuda/row_segments.cuh"

namespace tenfold::cuda {

// Rewards and values of a row's macro actions; gae_steps puts advantages and returns in their
// place.
struct PrepareSteps {
  const PrepareRule& rule;
  int64_t n;
  double score;  // added to the last reward
  const int32_t* first;
  float *rewards, *values;

  __device__ inline bool valid(int64_t) const { return true; }
  __device__ inline double value(int64_t t) const { return values[t]; }
  __device__ inline double reward(int64_t t) const {
    return static_cast<double>(rewards[t]) + (t == n - 1 ? score : 0.0);
  }
  __device__ inline double discount(int64_t t) const {
    if (!rule.gae.per_token) return rule.gae.gamma;
    return pow(rule.gae.gamma, static_cast<double>(first[t + 1] - first[t]));
  }
  __device__ inline void store(int64_t t, bool, double adv, double ret) const {
    rewards[t] = static_cast<float>(adv);
    values[t] = static_cast<float>(ret);
  }
};

// The sum of kl. Macro rewards, without the score unless they are pooled like values, and values.
__device__ inline double pool_row(const PrepareParams<float>& p, const RowSegments& row,
                                  int64_t begin, double score, float* rewards, float* values,
                                  int32_t* marks, double* sums) {
  const PrepareRule& rule = p.rule;
  MarkScan ranks{marks};
  SegmentScan<2> scan{sums};
  double kl = 0.0;
  for (int64_t tile = 0; tile < row.width; tile += kRowThreads) {
    const int64_t j = tile + threadIdx.x, at = begin + j;
    int32_t rank, before;
    ranks.step(j < row.width && row.seg[j] >= 0, static_cast<int32_t>(tile), &rank, &before);
    const RowSegments::Token t = row.token(j, rank);
    double x[2] = {0.0, 0.0};
    if (t.segment >= 0) {
      const double k = kl_term(rule.kl, static_cast<double>(p.old[at]) - p.ref[at]);
      const double share = pool_share(rule.sigma, t.place, t.length);
      kl += k;
      x[0] = -rule.beta * k;
      if (rule.reduce_sigma) {
        if (rank == row.count - 1) x[0] += score;
        x[0] = share != 0.0 ? share * x[0] : 0.0;
      } else if (rule.gae.per_token) {
        x[0] *= pow(rule.gae.gamma, static_cast<double>(t.place));
      }
      x[1] = share != 0.0 ? share * static_cast<double>(p.value[at]) : 0.0;
    }
    scan.step(t.head, x);
    if (!t.tail) continue;
    const double norm = pool_norm(rule.sigma, t.length);
    rewards[t.segment] = static_cast<float>(rule.reduce_sigma ? x[0] * norm : x[0]);
    values[t.segment] = static_cast<float>(x[1] * norm);
  }
  return kl;
}

__global__ void __launch_bounds__(kRowThreads)
    prepare_kernel(PrepareParams<float> p, int64_t capacity, int32_t* spare) {
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int32_t, marks, MarkScan::kInts);
  TENFOLD_SHARED(int32_t, ranks, MarkScan::kInts);
  TENFOLD_SHARED(int32_t, steps_marks, MarkScan::kInts);
  TENFOLD_SHARED(double, affine, AffineScan::kDoubles);
  TENFOLD_SHARED(double, sums, SegmentScan<2>::kDoubles);
  const int64_t b = blockIdx.x;
  const Span span = p.seg.rows[b];
  const int64_t width = span.width, n = count_at(p.nseg, b, width);
  const bool is_shared = width <= capacity;
  float *const adv_m = p.adv_m + span.begin, *const ret_m = p.ret_m + span.begin;
  float* const rewards = is_shared ? reinterpret_cast<float*>(memory) : adv_m;
  float* const values = is_shared ? rewards + capacity : ret_m;
  int32_t* const first =
      is_shared ? reinterpret_cast<int32_t*>(memory) + 2 * capacity : spare + span.begin + b;
  for (int64_t t = threadIdx.x; t < width; t += kRowThreads) rewards[t] = values[t] = 0.0f;
  const RowSegments row = find_segments(p.seg[b], width, first, marks);

  const double limit = p.rule.score_clip, given = p.score[b];
  const double score = given < -limit ? -limit : given > limit ? limit : given;
  const double kl =
      row_sum(pool_row(p, row, span.begin, score, rewards, values, ranks, sums), sums);
  if (threadIdx.x == 0) p.kl_row[b] = static_cast<float>(row.count > 0 ? kl / row.count : 0.0);

  const double bootstrap = p.bootstrap != nullptr ? static_cast<double>(p.bootstrap[b]) : 0.0;
  const PrepareSteps steps{p.rule, n, p.rule.reduce_sigma ? 0.0 : score, first, rewards, values};
  gae_steps(n, p.rule.gae.lam, bootstrap, steps, {steps_marks, affine});
  __syncthreads();

  for (int64_t j = threadIdx.x; j < width; j += kRowThreads) {
    const int32_t s = row.seg[j];
    const bool there = s >= 0 && s < n;
    p.adv[span.begin + j] = there ? rewards[s] : 0.0f;
    p.ret[span.begin + j] = there ? values[s] : 0.0f;
    if (is_shared || j >= n) {
      adv_m[j] = j < n ? rewards[j] : 0.0f;
      ret_m[j] = j < n ? values[j] : 0.0f;
    }
  }
}

constexpr int64_t prepare_bytes(int64_t capacity) {
  return capacity * 12 + 4;
}

// spare: spare_ints(rows, shared_tokens(rows)) numbers of working memory.
inline void launch_prepare(const PrepareParams<float>& p, int32_t* spare, cudaStream_t stream) {
  const Rows& rows = p.seg.rows;
  if (rows.count == 0) return;
  const int64_t capacity = shared_tokens(rows);
  TENFOLD_LAUNCH_SHARED(prepare_kernel, static_cast<unsigned>(rows.count), kRowThreads,
                        prepare_bytes(capacity), prepare_bytes(kMostShared), stream, p, capacity,
                        spare);
}

}  // namespace tenfold::cuda
