// SPDX-License-Identifier: Apache-2.0
// Device code of PPO's losses: terms and their slopes with sums per block, then one block that adds
// them in a fixed order and makes the loss, its statistics and the scales of rows. No atomics: the
// same bits every time. The backward multiplies.
#pragma once

#include "rl/cuda/row_segments.cuh"
#include "rl/losses.h"

namespace tenfold::cuda {

// Tokens of a block; longer rows are several parts. Packed rows, of unknown widths, are one each.
constexpr int64_t kPartTokens = 4096;

inline int64_t row_parts(const Rows& rows) {
  if (rows.offsets.data != nullptr || rows.width == 0) return 1;
  return (rows.width + kPartTokens - 1) / kPartTokens;
}

// The part of a row that a block works on.
__device__ inline Span part_of(const Rows& rows, int64_t parts, int64_t block) {
  Span span = rows[block / parts];
  if (parts == 1) return span;
  const int64_t begin = block % parts * kPartTokens, left = span.width - begin;
  return {span.begin + begin, left < kPartTokens ? left : kPartTokens};
}

// In all threads. `sums`: kRowWarps shared numbers.
__device__ inline RowSums block_total(const RowSums& s, double* sums) {
  RowSums all;
  all.loss = row_sum(s.loss, sums), all.weight = row_sum(s.weight, sums);
  all.tokens = row_sum(s.tokens, sums), all.log_ratio = row_sum(s.log_ratio, sums);
  all.terms = row_sum(s.terms, sums), all.ratio = row_sum(s.ratio, sums);
  all.high = row_sum(s.high, sums), all.low = row_sum(s.low, sums);
  all.most = row_max(s.most, sums);
  return all;
}

__global__ void __launch_bounds__(kRowThreads)
    policy_token_kernel(PolicyParams<float> p, int64_t parts, RowSums* of_blocks) {
  TENFOLD_SHARED(double, sums, kRowWarps);
  const int64_t b = blockIdx.x / parts;
  const Span row = p.seg.rows[b], part = part_of(p.seg.rows, parts, blockIdx.x);
  const SegmentRow seg = p.seg[b];
  RowSums mine;
  for (int64_t i = part.begin + threadIdx.x; i < part.begin + part.width; i += kRowThreads) {
    float slope = 0.0f;
    if (seg[i - row.begin] >= 0) {
      const double ratio = static_cast<double>(p.now[i]) - p.old[i];
      const PolicyTerm t = policy_term(p.rule, ratio, p.adv[i]);
      mine.add(t, 1.0);
      mine.tokens += 1.0, mine.log_ratio += ratio;
      slope = static_cast<float>(t.slope);
    }
    if (p.slope != nullptr) p.slope[i] = slope;
  }
  const RowSums all = block_total(mine, sums);
  if (threadIdx.x == 0) of_blocks[blockIdx.x] = all;
}

// joint and geo_mean: log-ratios and advantages are summed over macro actions, whose slopes stay in
// shared memory (of rows too long for that in `spare_slope`) for their tokens.
__global__ void __launch_bounds__(kRowThreads)
    policy_macro_kernel(PolicyParams<float> p, int64_t capacity, int32_t* spare, float* spare_slope,
                        RowSums* of_blocks) {
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int32_t, marks, MarkScan::kInts);
  TENFOLD_SHARED(int32_t, ranks, MarkScan::kInts);
  TENFOLD_SHARED(double, sums, SegmentScan<2>::kDoubles);
  const int64_t b = blockIdx.x;
  const Span span = p.seg.rows[b];
  const bool is_shared = span.width <= capacity;
  float* const slopes = is_shared ? reinterpret_cast<float*>(memory) : spare_slope + span.begin;
  int32_t* const first =
      is_shared ? reinterpret_cast<int32_t*>(memory) + capacity : spare + span.begin + b;
  for (int64_t t = threadIdx.x; t < span.width; t += kRowThreads) slopes[t] = 0.0f;
  const RowSegments row = find_segments(p.seg[b], span.width, first, marks);
  MarkScan rank{ranks};
  SegmentScan<2> scan{sums};
  RowSums mine;
  for (int64_t tile = 0; tile < span.width; tile += kRowThreads) {
    const int64_t j = tile + threadIdx.x, at = span.begin + j;
    int32_t place, before;
    rank.step(j < span.width && row.seg[j] >= 0, static_cast<int32_t>(tile), &place, &before);
    const RowSegments::Token t = row.token(j, place);
    double x[2] = {0.0, 0.0};
    if (t.segment >= 0) {
      x[0] = static_cast<double>(p.now[at]) - p.old[at], x[1] = p.adv[at];
      mine.tokens += 1.0, mine.log_ratio += x[0];
    }
    scan.step(t.head, x);
    if (!t.tail) continue;
    const double share = macro_share(p.rule, t.length), weight = macro_weight(p.rule, t.length);
    const PolicyTerm term = policy_term(p.rule, x[0] * share, x[1] / static_cast<double>(t.length));
    mine.add(term, weight);
    slopes[t.segment] = static_cast<float>(term.slope * share * weight);
  }
  const RowSums all = block_total(mine, sums);  // begins with a barrier
  if (threadIdx.x == 0) of_blocks[b] = all;
  if (p.slope == nullptr) return;
  for (int64_t j = threadIdx.x; j < span.width; j += kRowThreads) {
    const int32_t s = row.seg[j];
    p.slope[span.begin + j] = s >= 0 ? slopes[s] : 0.0f;
  }
}

__global__ void __launch_bounds__(kRowThreads)
    value_kernel(ValueParams<float> p, int64_t parts, RowSums* of_blocks) {
  TENFOLD_SHARED(double, sums, kRowWarps);
  const Span part = part_of(p.rows, parts, blockIdx.x);
  RowSums mine;
  for (int64_t i = part.begin + threadIdx.x; i < part.begin + part.width; i += kRowThreads) {
    float slope = 0.0f;
    if (p.mask[i] != 0) {
      const ValueTerm t = value_term(p.clip, p.now[i], p.old[i], p.ret[i]);
      mine.add(t);
      slope = static_cast<float>(t.slope);
    }
    if (p.slope != nullptr) p.slope[i] = slope;
  }
  const RowSums all = block_total(mine, sums);
  if (threadIdx.x == 0) of_blocks[blockIdx.x] = all;
}

// Where a loss goes; scale null: not asked for.
struct LossTarget {
  MeanRule mean;
  bool policy;  // whose statistics
  float *loss, *stats;
  double* scale;
};

__device__ inline RowSums row_total(const RowSums* of_blocks, int64_t parts, int64_t b) {
  RowSums row = of_blocks[b * parts];
  for (int64_t i = 1; i < parts; ++i) row.add(of_blocks[b * parts + i]);
  return row;
}

__global__ void __launch_bounds__(kRowThreads)
    finish_loss_kernel(LossTarget out, int64_t rows, int64_t parts, const RowSums* of_blocks) {
  TENFOLD_SHARED(double, sums, kRowWarps);
  RowSums mine;
  double some = 0.0, loss = 0.0;
  for (int64_t b = threadIdx.x; b < rows; b += kRowThreads) {
    const RowSums row = row_total(of_blocks, parts, b);
    mine.add(row);
    some += row.weight > 0.0 ? 1.0 : 0.0;
  }
  const RowSums all = block_total(mine, sums);
  const double by = out.mean.divisor(all.weight, row_sum(some, sums));
  for (int64_t b = threadIdx.x; b < rows; b += kRowThreads) {
    const RowSums row = row_total(of_blocks, parts, b);
    const double scale = out.mean.scale(row.weight, by);
    loss += row.loss * scale;
    if (out.scale != nullptr) out.scale[b] = scale;
  }
  const double total = row_sum(loss, sums);
  if (threadIdx.x != 0) return;
  *out.loss = static_cast<float>(total);
  if (out.policy) {
    write_policy_stats(all, out.stats);
  } else {
    write_value_stats(all, out.stats);
  }
}

__global__ void __launch_bounds__(kRowThreads) slope_kernel(SlopeParams<float> p, int64_t parts) {
  const int64_t b = blockIdx.x / parts;
  const Span part = part_of(p.rows, parts, blockIdx.x);
  const double by = static_cast<double>(*p.grad) * p.scale[b];
  for (int64_t i = part.begin + threadIdx.x; i < part.begin + part.width; i += kRowThreads) {
    const float slope = p.slope[i];
    p.out[i] = slope == 0.0f ? 0.0f : static_cast<float>(slope * by);
  }
}

inline void finish_loss(const LossTarget& out, int64_t rows, int64_t parts,
                        const RowSums* of_blocks, cudaStream_t stream) {
  TENFOLD_LAUNCH(finish_loss_kernel, 1, kRowThreads, stream, out, rows, parts, of_blocks);
}

// Working memory of a policy loss. Bytes; of_blocks: as many RowSums as blocks.
inline int64_t policy_parts(const PolicyParams<float>& p) {
  return p.rule.ratio == RatioBy::token ? row_parts(p.seg.rows) : 1;
}

struct PolicySpare {
  RowSums* of_blocks;  // rows * policy_parts
  int32_t* first;      // spare_ints(rows, shared_tokens(rows)) numbers each, if not by token
  float* slope;
};

inline void launch_policy(const PolicyParams<float>& p, const LossTarget& out,
                          const PolicySpare& spare, cudaStream_t stream) {
  const Rows& rows = p.seg.rows;
  const int64_t parts = policy_parts(p);
  const auto blocks = static_cast<unsigned>(rows.count * parts);
  if (blocks > 0 && p.rule.ratio == RatioBy::token)
    TENFOLD_LAUNCH(policy_token_kernel, blocks, kRowThreads, stream, p, parts, spare.of_blocks);
  if (blocks > 0 && p.rule.ratio != RatioBy::token) {
    const int64_t capacity = shared_tokens(rows);
    TENFOLD_LAUNCH_SHARED(policy_macro_kernel, blocks, kRowThreads, capacity * 8 + 4,
                          kMostShared * 8 + 4, stream, p, capacity, spare.first, spare.slope,
                          spare.of_blocks);
  }
  finish_loss(out, rows.count, parts, spare.of_blocks, stream);
}

// of_blocks: rows * row_parts.
inline void launch_value(const ValueParams<float>& p, const LossTarget& out, RowSums* of_blocks,
                         cudaStream_t stream) {
  const int64_t parts = row_parts(p.rows);
  const auto blocks = static_cast<unsigned>(p.rows.count * parts);
  if (blocks > 0) TENFOLD_LAUNCH(value_kernel, blocks, kRowThreads, stream, p, parts, of_blocks);
  finish_loss(out, p.rows.count, parts, of_blocks, stream);
}

inline void launch_slope(const SlopeParams<float>& p, cudaStream_t stream) {
  const int64_t parts = row_parts(p.rows);
  const auto blocks = static_cast<unsigned>(p.rows.count * parts);
  if (blocks > 0) TENFOLD_LAUNCH(slope_kernel, blocks, kRowThreads, stream, p, parts);
}

}  // namespace tenfold::cuda
