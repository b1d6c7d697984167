// SPDX-License-Identifier: Apache-2.0
// Device code of macro_pool, its backward, and macro_segment_check: a block per row.
#pragma once

#include "rl/cuda/row_segments.cuh"
#include "rl/returns.h"

namespace tenfold::cuda {

// `first` of row b: in shared memory, or if the row is too long for it in `spare`.
__device__ inline int32_t* first_of(int32_t* shared, int64_t capacity, int32_t* spare,
                                    const Span& span, int64_t b) {
  return span.width <= capacity ? shared : spare + span.begin + b;
}

__global__ void __launch_bounds__(kRowThreads)
    pool_kernel(PoolParams<float> p, int64_t capacity, int32_t* spare) {
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int32_t, marks, MarkScan::kInts);
  TENFOLD_SHARED(int32_t, ranks, MarkScan::kInts);
  TENFOLD_SHARED(double, sums, SegmentScan<1>::kDoubles);
  const int64_t b = blockIdx.x;
  const Span span = p.seg.rows[b];
  float* const out = p.out + b * p.count;
  for (int64_t t = threadIdx.x; t < p.count; t += kRowThreads) out[t] = 0.0f;
  int32_t* const first = first_of(reinterpret_cast<int32_t*>(memory), capacity, spare, span, b);
  const RowSegments row = find_segments(p.seg[b], span.width, first, marks);
  MarkScan rank{ranks};
  SegmentScan<1> sum{sums};
  for (int64_t tile = 0; tile < span.width; tile += kRowThreads) {
    const int64_t j = tile + threadIdx.x;
    int32_t mine, before;
    rank.step(j < span.width && row.seg[j] >= 0, static_cast<int32_t>(tile), &mine, &before);
    const RowSegments::Token t = row.token(j, mine);
    const double share = t.segment < 0 ? 0.0 : pool_share(p.by, t.place, t.length);
    double x[1] = {share != 0.0 ? share * static_cast<double>(p.x[span.begin + j]) : 0.0};
    sum.step(t.head, x);
    if (t.tail) out[t.segment] = static_cast<float>(x[0] * pool_norm(p.by, t.length));
  }
}

__global__ void __launch_bounds__(kRowThreads)
    pool_backward_kernel(PoolParams<float> p, int64_t capacity, int32_t* spare) {
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int32_t, marks, MarkScan::kInts);
  TENFOLD_SHARED(int32_t, ranks, MarkScan::kInts);
  const int64_t b = blockIdx.x;
  const Span span = p.seg.rows[b];
  int32_t* const first = first_of(reinterpret_cast<int32_t*>(memory), capacity, spare, span, b);
  const RowSegments row = find_segments(p.seg[b], span.width, first, marks);
  MarkScan rank{ranks};
  for (int64_t tile = 0; tile < span.width; tile += kRowThreads) {
    const int64_t j = tile + threadIdx.x;
    int32_t mine, before;
    rank.step(j < span.width && row.seg[j] >= 0, static_cast<int32_t>(tile), &mine, &before);
    if (j >= span.width) continue;
    const RowSegments::Token t = row.token(j, mine);
    double y = 0.0;
    if (t.segment >= 0) {
      const double w = pool_share(p.by, t.place, t.length) * pool_norm(p.by, t.length);
      if (w != 0.0) y = w * static_cast<double>(p.x[b * p.count + t.segment]);
    }
    p.out[span.begin + j] = static_cast<float>(y);
  }
}

__global__ void __launch_bounds__(kRowThreads) segment_check_kernel(CheckParams p) {
  TENFOLD_SHARED(int32_t, marks, MarkScan::kInts);
  TENFOLD_SHARED(int32_t, wrong, 1);
  const int64_t b = blockIdx.x;
  const Span span = p.rows[b];
  const Ints seg = p.seg.from(span.begin);
  if (threadIdx.x == 0) wrong[0] = 0;
  __syncthreads();
  MarkScan scan{marks};
  for (int64_t tile = 0; tile < span.width; tile += kRowThreads) {
    const int64_t j = tile + threadIdx.x;
    const int64_t s = j < span.width ? seg[j] : -1;
    int32_t rank, before;
    scan.step(s >= 0, static_cast<int32_t>(tile), &rank, &before);
    const int64_t last = before < 0 ? -1 : seg[before];
    if (s < -1 || (s >= 0 && s != last && s - 1 != last)) wrong[0] = 1;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const int64_t found = scan.last < 0 ? 0 : seg[scan.last] + 1;
  const bool counted = p.nseg.data == nullptr || p.nseg[b] == found;
  p.wrong[b] = wrong[0] != 0 || found > p.limit || !counted ? 1 : 0;
}

constexpr int64_t kMostPoolShared = (kMostShared + 1) * 4;

inline int64_t pool_spare(const Rows& rows) {
  return spare_ints(rows, shared_tokens(rows));
}

// spare: pool_spare(rows) numbers of working memory.
inline void launch_pool(const PoolParams<float>& p, bool backward, int32_t* spare,
                        cudaStream_t stream) {
  const Rows& rows = p.seg.rows;
  if (rows.count == 0) return;
  const auto blocks = static_cast<unsigned>(rows.count);
  const int64_t capacity = shared_tokens(rows), bytes = (capacity + 1) * 4;
  if (backward) {
    TENFOLD_LAUNCH_SHARED(pool_backward_kernel, blocks, kRowThreads, bytes, kMostPoolShared, stream,
                          p, capacity, spare);
  } else {
    TENFOLD_LAUNCH_SHARED(pool_kernel, blocks, kRowThreads, bytes, kMostPoolShared, stream, p,
                          capacity, spare);
  }
}

inline void launch_segment_check(const CheckParams& p, cudaStream_t stream) {
  if (p.rows.count > 0)
    TENFOLD_LAUNCH(segment_check_kernel, static_cast<unsigned>(p.rows.count), kRowThreads, stream,
                   p);
}

}  // namespace tenfold::cuda
