// SPDX-License-Identifier: Apache-2.0
// The segments of a row, for one block: where each begins among the valid tokens.
#pragma once

#include "rl/cuda/row_scan.cuh"
#include "rl/rows.h"

namespace tenfold::cuda {

// Rows up to this width are worked on in shared memory: with 12 bytes per token this fits every GPU
// since sm_80. Packed rows, whose widths the host does not know, up to the second, so that several
// blocks fit a multiprocessor. Longer rows use memory in the device's second cache.
constexpr int64_t kMostShared = 8192, kMostSharedPacked = 4096;

inline int64_t shared_tokens(const Rows& rows) {
  const int64_t most = rows.offsets.data == nullptr ? kMostShared : kMostSharedPacked;
  return rows.width < most ? rows.width : most;
}

// int32 numbers that rows longer than `shared` need, for their `first` (below): none if there are
// no such rows.
inline int64_t spare_ints(const Rows& rows, int64_t shared) {
  return rows.width > shared ? rows.total + rows.count : 0;
}

// What a row finds out about its segments.
struct RowSegments {
  SegmentRow seg;
  int32_t width;
  int32_t* first;  // [seg.limit + 1]: rank of a segment's first token; then the number of tokens
  int32_t count;   // valid tokens

  // A token: its segment, place there, and the length of that; -1 if it is masked. Whatever `seg`
  // holds, 0 <= place < length.
  struct Token {
    int32_t segment, place, length;
    bool head, tail;
  };
  __device__ inline Token token(int64_t j, int32_t rank) const {
    const int32_t s = j < width ? seg[j] : -1;
    if (s < 0) return {-1, 0, 1, false, false};
    const int32_t begin = first[s], length = first[s + 1] - begin, place = rank - begin;
    const int32_t some = length < 1 ? 1 : length;
    const int32_t inside = place < 0 ? 0 : place >= some ? some - 1 : place;
    return {s, inside, some, place == 0, place == length - 1};
  }
};

// Finds them; `marks`: shared memory of a MarkScan. Ends with a barrier.
__device__ inline RowSegments find_segments(const SegmentRow& seg, int64_t width, int32_t* first,
                                            int32_t* marks) {
  const int32_t limit = static_cast<int32_t>(seg.limit);
  for (int32_t s = static_cast<int32_t>(threadIdx.x); s <= limit; s += kRowThreads) first[s] = 0;
  __syncthreads();
  MarkScan scan{marks};
  for (int64_t tile = 0; tile < width; tile += kRowThreads) {
    const int64_t j = tile + threadIdx.x;
    const int32_t s = j < width ? seg[j] : -1;
    int32_t rank, before;
    scan.step(s >= 0, static_cast<int32_t>(tile), &rank, &before);
    if (s >= 0 && (before < 0 || seg[before] != s)) first[s] = rank;
  }
  if (threadIdx.x == 0 && scan.last >= 0) first[seg[scan.last] + 1] = scan.count;
  __syncthreads();
  return {seg, static_cast<int32_t>(width), first, scan.count};
}

}  // namespace tenfold::cuda
