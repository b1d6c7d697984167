// SPDX-License-Identifier: Apache-2.0
// Device code of span_restore (corruption/spans.h): a block a row. Of each sentinel the first
// position on either side is found; a text ends at the next sentinel, which bits lead to.
#pragma once

#include "corruption/cuda/spans_kernel.cuh"

namespace tenfold::cuda {

struct RestoreArgs {
  const void *inputs, *targets;
  IntArray in_len, tgt_len;
  int64_t rows, in_width, tgt_width, in_stride, tgt_stride;
  int64_t first_sentinel, num_sentinels, eos, pad;
  void* tokens;  // [rows, width]
  int64_t width;
  int32_t* lengths;
  int32_t* memory;
  int64_t ints;
};

// A row's tokens, and which of them are sentinels.
template <class T>
struct Side {
  const T* tokens;
  int64_t n, lowest, count;
  int32_t* first;  // of each sentinel: most - its first position, 0: none
  int64_t most;

  __device__ Side(const T* row, int64_t length, const RestoreArgs& a, int32_t* table, int64_t width)
      : tokens(row),
        n(length > 0 && row[length - 1] == a.eos ? length - 1 : length),
        lowest(a.first_sentinel - a.num_sentinels + 1),
        count(a.num_sentinels),
        first(table),
        most(width) {}
  __device__ bool marks(int64_t i) const {
    return static_cast<uint64_t>(tokens[i]) - static_cast<uint64_t>(lowest) <
           static_cast<uint64_t>(count);
  }
  __device__ int64_t sentinel(int64_t i) const { return tokens[i] - lowest; }
  __device__ void note() {
    for (int64_t i = threadIdx.x; i < n; i += kSpanThreads)
      if (marks(i)) atomicMax(&first[sentinel(i)], static_cast<int32_t>(most - i));
  }
  // -1: nowhere.
  __device__ int64_t position(int64_t s) const { return first[s] == 0 ? -1 : most - first[s]; }
};

// The first set bit from i on, n if there is none before.
__device__ inline int64_t next_bit(const uint32_t* words, int64_t i, int64_t n) {
  while (i < n) {
    const uint32_t rest = words[i / 32] >> (i % 32);
    if (rest != 0) {
      const int64_t found = i + lowest_bit(rest);
      return found < n ? found : n;
    }
    i = (i / 32 + 1) * 32;
  }
  return n;
}

template <class T>
static __global__ void __launch_bounds__(kSpanThreads) span_restore_kernel(RestoreArgs a) {
  TENFOLD_DYNAMIC_SHARED(shared);
  TENFOLD_SHARED(int64_t, sums, kSpanThreads / 32);
  const int64_t row = blockIdx.x;
  int32_t* const memory = row_memory(a.memory, a.ints, shared);
  Side<T> in(static_cast<const T*>(a.inputs) + row * a.in_stride,
             row_length(a.in_len, row, a.in_width), a, memory, a.in_width);
  Side<T> tgt(static_cast<const T*>(a.targets) + row * a.tgt_stride,
              row_length(a.tgt_len, row, a.tgt_width), a, memory + a.num_sentinels, a.tgt_width);
  auto* const bits = reinterpret_cast<uint32_t*>(memory + 2 * a.num_sentinels);
  block_fill(memory, 2 * a.num_sentinels, 0);
  __syncthreads();
  in.note();
  tgt.note();
  block_flags(bits, tgt.n, [&](int64_t i) { return tgt.marks(i); });
  auto* const out = static_cast<T*>(a.tokens) + row * a.width;
  int64_t made = 0;
  for (int64_t first = 0; first < in.n; first += kSpanThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t count = 0, from = -1;
    if (i < in.n && !in.marks(i)) {
      count = 1;
    } else if (i < in.n && in.position(in.sentinel(i)) == i) {
      const int64_t at = tgt.position(in.sentinel(i));
      if (at >= 0) from = at + 1, count = next_bit(bits, from, tgt.n) - from;
    }
    int64_t total;
    const int64_t to = made + block_before<kSpanThreads>(count, sums, &total);
    made += total;
    if (from < 0 && count > 0) out[to] = in.tokens[i];
    for (int64_t j = 0; from >= 0 && j < count; ++j) out[to + j] = tgt.tokens[from + j];
  }
  if (threadIdx.x == 0) a.lengths[row] = static_cast<int32_t>(made);
  block_fill(out + made, a.width - made, static_cast<T>(a.pad));
}

// All but memory and ints.
template <class T>
void launch_span_restore(RestoreArgs a, const Room& room, cudaStream_t stream) {
  if (a.rows == 0) return;
  const int64_t bytes = place_rows(a, 2 * a.num_sentinels + bit_words(a.tgt_width), room);
  TENFOLD_LAUNCH_SHARED(span_restore_kernel<T>, static_cast<unsigned>(a.rows), kSpanThreads, bytes,
                        kRowShared, stream, a);
}

}  // namespace tenfold::cuda
