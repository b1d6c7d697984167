// SPDX-License-Identifier: Apache-2.0
// Device code of the segmentation ops: a block per row, which numbers valid tokens and segments by
// prefix sums. fixed, starts, token_rise and lengths (a search in the prefix sums of the lengths)
// know from a token and its rank whether it begins a segment; response_prefix compares with a
// prefix sum of nll. token_rise_ref and macro_prefix mark beginnings in `seg` first: there a token
// decides about the one before it, and macro_prefix is a walk, token by token, of one thread of the
// block over what the others have brought into shared memory: each mean depends on where the
// segment before it ended.
#pragma once

#include "core/scan.cuh"
#include "rl/cuda/row_scan.cuh"
#include "rl/segments.h"

namespace tenfold::cuda {

constexpr int64_t kStaged = 2048;             // tokens of a walk in shared memory
constexpr int64_t kMostSharedLengths = 4096;  // prefix sums of more lengths are in `spare`

__device__ inline int64_t row_length(const int32_t* lengths, int64_t k) {
  return lengths[k] < 1 ? 1 : lengths[k];  // the host cannot check them without waiting
}

// prefix[k] = sum of the first k of `count` lengths, k up to count. Ends with a barrier.
__device__ inline void prefix_lengths(const int32_t* lengths, int64_t count, int64_t* prefix,
                                      int64_t* sums) {
  int64_t carry = 0;
  for (int64_t tile = 0; tile < count; tile += kRowThreads) {
    const int64_t k = tile + threadIdx.x;
    int64_t total;
    const int64_t before =
        block_before<kRowThreads>(k < count ? row_length(lengths, k) : 0, sums, &total);
    if (k < count) prefix[k] = carry + before;
    carry += total;
  }
  if (threadIdx.x == 0) prefix[count] = carry;
  __syncthreads();
}

// Whether one of `count` lengths ends before the token of rank q.
__device__ inline bool ends_at(const int64_t* prefix, int64_t count, bool recycle, int64_t q) {
  if (count == 0) return false;
  const int64_t at = recycle ? q % prefix[count] : q;
  int64_t low = 0, high = count;  // the last prefix that is at most `at`
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (prefix[middle] <= at) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return prefix[low] == at;
}

// One row, and the shared memory of its scans.
struct SegmentRowJob {
  const SegmentParams& p;
  int64_t b, width;
  const uint8_t* mask;
  const float* nll;
  int32_t* seg;
  int32_t* marks;
  float* staged;

  __device__ inline bool valid(int64_t j) const { return j < width && mask[j] != 0; }
  __device__ inline bool after_hole(int64_t j, int32_t before) const {
    return p.split && before >= 0 && before != j - 1;
  }

  // Column of the last valid token, -1 if there is none. Ends with a barrier.
  __device__ inline int32_t last_valid() const {
    MarkScan scan{marks};
    int32_t rank, before;
    for (int64_t tile = 0; tile < width; tile += kRowThreads)
      scan.step(valid(tile + threadIdx.x), static_cast<int32_t>(tile), &rank, &before);
    __syncthreads();
    return scan.last;
  }

  // token_rise_ref: seg[j] = whether valid token j begins a segment. Ends with a barrier.
  __device__ inline void mark_before_rise() const {
    MarkScan scan{marks};
    for (int64_t tile = 0; tile < width; tile += kRowThreads) {
      const int64_t j = tile + threadIdx.x;
      const bool here = valid(j);
      int32_t rank, before;
      scan.step(here, static_cast<int32_t>(tile), &rank, &before);
      if (here && before >= 0) seg[before] = nll[j] > nll[before] ? 1 : 0;
    }
    if (threadIdx.x == 0 && scan.last >= 0) seg[scan.last] = 1;
    __syncthreads();
  }

  // macro_prefix, likewise.
  __device__ inline void mark_means() const {
    RunningMean mean;
    bool hole = false;
    auto* const state = reinterpret_cast<int32_t*>(staged + kStaged);  // 0: masked
    for (int64_t tile = 0; tile < width; tile += kStaged) {
      const int64_t some = width - tile < kStaged ? width - tile : kStaged;
      for (int64_t i = threadIdx.x; i < some; i += kRowThreads) {
        staged[i] = nll[tile + i];
        state[i] = mask[tile + i] != 0 ? 1 : 0;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int64_t i = 0; i < some; ++i) {
          if (state[i] == 0) {
            hole = true;
            continue;
          }
          const bool already = p.split && hole;
          state[i] = mean.begins(staged[i], already) || already ? 1 : 0;
          hole = false;
        }
      }
      __syncthreads();
      for (int64_t i = threadIdx.x; i < some; i += kRowThreads) seg[tile + i] = state[i];
      __syncthreads();
    }
  }

  // Whether a valid token begins a segment.
  __device__ inline bool begins(int64_t j, int32_t rank, int32_t before, int32_t last, double total,
                                const int64_t* prefix) const {
    const bool is_last = p.isolate_last && j == last;
    if (rank == 0 || is_last || after_hole(j, before)) return true;
    switch (p.by) {
      case SegmentBy::fixed: return rank % p.n == 0;
      case SegmentBy::lengths: return ends_at(prefix, p.num_lengths, p.recycle, rank);
      case SegmentBy::starts: return p.starts_row(b)[j] != 0;
      case SegmentBy::token_rise: return nll[j] > nll[before];
      case SegmentBy::response_prefix:
        return static_cast<double>(nll[j]) * static_cast<double>(rank) > total;
      default: return seg[j] != 0;
    }
  }
};

// spare: prefix sums of rows of more lengths than kMostSharedLengths.
__global__ void __launch_bounds__(kRowThreads) segment_kernel(SegmentParams p, int64_t* spare) {
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int32_t, marks, MarkScan::kInts);
  TENFOLD_SHARED(int32_t, ranks, MarkScan::kInts);
  TENFOLD_SHARED(int32_t, numbers, MarkScan::kInts);
  TENFOLD_SHARED(double, affine, AffineScan::kDoubles);
  const int64_t b = blockIdx.x;
  const Span span = p.rows[b];
  const SegmentRowJob job{p,
                          b,
                          span.width,
                          p.mask_row(b),
                          p.nll != nullptr ? p.nll + span.begin : nullptr,
                          p.seg + span.begin,
                          marks,
                          reinterpret_cast<float*>(memory)};
  int64_t* prefix = nullptr;
  if (p.by == SegmentBy::lengths) {
    prefix = p.num_lengths <= kMostSharedLengths ? reinterpret_cast<int64_t*>(memory)
                                                 : spare + b * (p.num_lengths + 1);
    prefix_lengths(p.lengths + b * p.num_lengths, p.num_lengths, prefix,
                   reinterpret_cast<int64_t*>(affine));
  }
  const int32_t last = p.isolate_last ? job.last_valid() : -1;
  if (p.by == SegmentBy::token_rise_ref) job.mark_before_rise();
  if (p.by == SegmentBy::macro_prefix) job.mark_means();

  MarkScan rank_scan{ranks}, number_scan{numbers};
  AffineScan total_scan{affine};
  for (int64_t tile = 0; tile < span.width; tile += kRowThreads) {
    const int64_t j = tile + threadIdx.x;
    const bool valid = job.valid(j);
    int32_t rank, before, number, unused;
    rank_scan.step(valid, static_cast<int32_t>(tile), &rank, &before);
    double total = 0.0;
    if (p.by == SegmentBy::response_prefix)
      total_scan.step(1.0, valid ? static_cast<double>(job.nll[j]) : 0.0, &total);
    const bool begin = valid && job.begins(j, rank, before, last, total, prefix);
    number_scan.step(begin, static_cast<int32_t>(tile), &number, &unused);
    if (j < span.width) job.seg[j] = valid ? number + (begin ? 1 : 0) - 1 : -1;
  }
  if (threadIdx.x == 0) p.nseg[b] = number_scan.count;
}

// int64 numbers of working memory.
inline int64_t segment_spare(const SegmentParams& p) {
  return p.num_lengths > kMostSharedLengths ? p.rows.count * (p.num_lengths + 1) : 0;
}

inline void launch_segments(const SegmentParams& p, int64_t* spare, cudaStream_t stream) {
  if (p.rows.count == 0) return;
  int64_t bytes = 0;
  if (p.by == SegmentBy::macro_prefix) bytes = kStaged * 8;
  if (p.by == SegmentBy::lengths && p.num_lengths <= kMostSharedLengths)
    bytes = (p.num_lengths + 1) * 8;
  TENFOLD_LAUNCH_SHARED(segment_kernel, static_cast<unsigned>(p.rows.count), kRowThreads, bytes,
                        (kMostSharedLengths + 1) * 8, stream, p, spare);
}

}  // namespace tenfold::cuda
