// SPDX-License-Identifier: Apache-2.0
// Device code of trace_token_class, lm_weight and first_stop (loss/traces.h): a block a row, but
// for the second, where it is a part of one. A row's classes come from a running scan of its
// special tokens: a step of the block has one barrier.
#pragma once

#include "core/block_sums.cuh"
#include "core/convert.cuh"
#include "core/vectors.cuh"
#include "loss/traces.h"

namespace tenfold::cuda {

constexpr int kTraceThreads = 512, kTraceWarps = kTraceThreads / 32;

struct TraceArgs {
  IntArray ids;
  const uint8_t* mask;
  IntArray trace_start, answer_start;
  int64_t rows, length, ids_stride, mask_stride;
  TraceIds special;
  uint8_t* out;  // [rows, length]
};

// Position of the highest set bit of x > 0.
__device__ inline int highest_of(uint32_t x) {
  for (int step = 1; step < 32; step *= 2) x |= x >> step;
  return __popc(x) - 1;
}

// The class after two stretches of tokens: of the latter, if there is a special token in it. An end
// of sequence is for good.
__device__ inline int class_after_both(int first, int then) {
  return first == kIgnore || then == kOrdinary ? first : then;
}

static __global__ void __launch_bounds__(kTraceThreads) trace_classes_kernel(TraceArgs a) {
  TENFOLD_SHARED(int, of_warps, 2 * kTraceWarps);
  const int64_t row = blockIdx.x;
  const int64_t answer = a.answer_start[row], trace = a.trace_start[row];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const uint32_t earlier = (1u << lane) - 1u;
  int kind = kTool, turn = 0;
  for (int64_t tile = 0; tile < a.length; tile += kTraceThreads, turn ^= kTraceWarps) {
    const int64_t j = tile + threadIdx.x;
    const bool there = j < a.length && a.mask[row * a.mask_stride + j] != 0;
    const bool in_trace = there && j >= trace;
    const int after = in_trace ? class_after(a.special, a.ids[row * a.ids_stride + j]) : kOrdinary;
    const uint32_t special = __ballot_sync(0xFFFFFFFFu, after != kOrdinary);
    const uint32_t ends = __ballot_sync(0xFFFFFFFFu, after == kIgnore);
    // What the special tokens of this warp that are before this token, or all of them, lead to.
    const auto last = [&](uint32_t which) {
      const int from = (special & which) != 0 ? highest_of(special & which) : 0;
      const int found = __shfl_sync(0xFFFFFFFFu, after, from);
      return (ends & which) != 0 ? int{kIgnore} : (special & which) != 0 ? found : int{kOrdinary};
    };
    int before = last(earlier);
    const int all = last(0xFFFFFFFFu);
    if (lane == 0) of_warps[turn + warp] = all;
    __syncthreads();
    for (int w = 0; w < kTraceWarps; ++w) {
      if (w == warp) before = class_after_both(kind, before);
      kind = class_after_both(kind, of_warps[turn + w]);
    }
    if (j >= a.length) continue;
    uint8_t out = kIgnore;
    if (in_trace) {
      out = class_of(static_cast<uint8_t>(before), static_cast<uint8_t>(after));
    } else if (there && j >= answer) {
      out = kAnswer;
    }
    a.out[row * a.length + j] = out;
  }
}

inline void launch_trace_classes(const TraceArgs& a, cudaStream_t stream) {
  if (a.rows > 0 && a.length > 0)
    TENFOLD_LAUNCH(trace_classes_kernel, static_cast<unsigned>(a.rows), kTraceThreads, stream, a);
}

constexpr int kWeightThreads = 256, kWeightEach = 4;

struct ClassWeightArgs {
  const uint8_t *cls, *positive;
  int64_t rows, length, stride, parts;  // parts: blocks of a row
  float beta, omega;
  bool on_positive;
  bool words;  // four classes may be read at once, four weights be written
  float* out;  // [rows, length]
};

static __global__ void __launch_bounds__(kWeightThreads) class_weights_kernel(ClassWeightArgs a) {
  const int64_t row = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  const bool answer = a.on_positive && a.positive[row] != 0;
  const int64_t j = (part * kWeightThreads + threadIdx.x) * kWeightEach;
  if (j >= a.length) return;
  const uint8_t* const from = a.cls + row * a.stride + j;
  const int64_t n = a.length - j;
  uint8_t cls[kWeightEach] = {};
  if (a.words && n >= kWeightEach) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
    memcpy(cls, &word, sizeof(word));
  } else {
    for (int k = 0; k < kWeightEach && k < n; ++k) cls[k] = from[k];
  }
  float w[kWeightEach];
#pragma unroll
  for (int k = 0; k < kWeightEach; ++k) w[k] = class_weight(cls[k], a.beta, a.omega, answer);
  store_some<float, kWeightEach>(w, a.out + row * a.length + j, n, a.words);
}

inline int64_t weight_parts(int64_t length) {
  constexpr int64_t kEach = kWeightThreads * kWeightEach;
  return (length + kEach - 1) / kEach;
}

// All but parts and words.
inline void launch_class_weights(ClassWeightArgs a, cudaStream_t stream) {
  if (a.rows == 0 || a.length == 0) return;
  a.parts = weight_parts(a.length);
  a.words = reinterpret_cast<uintptr_t>(a.cls) % 4 == 0 && a.stride % 4 == 0 && a.length % 4 == 0 &&
            reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
  TENFOLD_LAUNCH(class_weights_kernel, static_cast<unsigned>(a.rows * a.parts), kWeightThreads,
                 stream, a);
}

constexpr int kStopThreads = 256;

struct StopArgs {
  IntArray ids, lens, stops;
  int64_t rows, length, stride, count;
  int64_t *pos, *which;
};

static __global__ void __launch_bounds__(kStopThreads) first_stop_kernel(StopArgs a) {
  TENFOLD_SHARED(int64_t, memory, kStopThreads / 32);
  const int64_t row = blockIdx.x, given = a.lens[row];
  const int64_t n = given < 0 ? 0 : given > a.length ? a.length : given;
  const auto stop_at = [&](int64_t j) {
    const int64_t id = a.ids[row * a.stride + j];
    for (int64_t k = 0; k < a.count; ++k)
      if (a.stops[k] == id) return k;
    return int64_t{-1};
  };
  int64_t mine = n;
  for (int64_t j = threadIdx.x; j < mine; j += kStopThreads)
    if (stop_at(j) >= 0) mine = j;
  const int64_t first = -block_max<kStopThreads>(-mine, memory);
  if (threadIdx.x != 0) return;
  a.pos[row] = first;
  a.which[row] = first < n ? stop_at(first) : -1;
}

inline void launch_first_stop(const StopArgs& a, cudaStream_t stream) {
  if (a.rows > 0)
    TENFOLD_LAUNCH(first_stop_kernel, static_cast<unsigned>(a.rows), kStopThreads, stream, a);
}

}  // namespace tenfold::cuda
