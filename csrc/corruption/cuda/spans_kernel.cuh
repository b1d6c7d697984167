// SPDX-License-Identifier: Apache-2.0
// Device code of span_mask, span_corrupt and span_corruption (corruption/spans.h): a block a row.
// The mask is in shared memory as bits; where a token goes follows from the set bits and the
// beginnings of spans before it, which are counted by words.
#pragma once

#include "core/room.h"
#include "corruption/cuda/draw_spans.cuh"

namespace tenfold::cuda {

constexpr int64_t kRowShared = 40 << 10;  // bytes of a row in shared memory, else in global

struct SpanDraw {
  SpanRule rule;
  int64_t seed;
  uint64_t offset;
  bool roll;
};

struct MaskArgs {
  IntArray lengths;
  SpanDraw draw;
  int64_t rows, width;
  uint8_t* mask;  // [rows, width]
  int32_t* memory;
  int64_t ints;  // of memory for a row
};

struct CorruptArgs {
  const void* tokens;
  IntArray lengths;
  const uint8_t* mask;  // null: drawn
  SpanDraw draw;
  SpanIds ids;
  int64_t rows, width, tokens_stride, mask_stride, max_inputs, max_targets;
  void *inputs, *targets;
  int32_t *in_len, *tgt_len;
  int32_t* memory;
  int64_t ints;
};

__device__ inline int64_t row_length(const IntArray& lengths, int64_t row, int64_t width) {
  const int64_t n = lengths[row];
  return n < 0 ? 0 : n > width ? width : n;
}

__device__ inline int32_t* row_memory(int32_t* global, int64_t ints, char* shared) {
  return global != nullptr ? global + blockIdx.x * ints : reinterpret_cast<int32_t*>(shared);
}

static __global__ void __launch_bounds__(kSpanThreads) span_mask_kernel(MaskArgs a) {
  TENFOLD_DYNAMIC_SHARED(shared);
  TENFOLD_SHARED(int64_t, sums, kSpanThreads / 32);
  const int64_t row = blockIdx.x, n = row_length(a.lengths, row, a.width);
  auto* const memory = row_memory(a.memory, a.ints, shared);
  auto* const bits = reinterpret_cast<uint32_t*>(memory);
  const DrawMemory m(memory + bit_words(a.width), a.width);
  const SpanStream stream = span_stream(a.draw.seed, a.draw.offset + static_cast<uint64_t>(row));
  block_draw(a.draw.rule, stream, a.draw.roll, n, m, sums, bits);
  for (int64_t i = threadIdx.x; i < a.width; i += kSpanThreads)
    a.mask[row * a.width + i] = i < n && bit_at(bits, i) ? 1 : 0;
}

// Of a row whose mask is there: bits, masked tokens and beginnings of spans before each word.
struct RowSpans {
  const uint32_t* bits;
  const int32_t *masked_before, *spans_before;
  bool begins_masked;

  // 1 where a span begins.
  __device__ static uint32_t begins(const uint32_t* bits, int64_t w) {
    const uint32_t before = w > 0 ? bits[w - 1] >> 31 : 0u;
    return bits[w] & ~(bits[w] << 1 | before);
  }
};

template <class T>
__device__ inline void write_row(const CorruptArgs& a, const RowSpans& r, int64_t n,
                                 const T* tokens, T* inputs, T* targets) {
  const int64_t top = a.ids.first_sentinel;
  for (int64_t i = threadIdx.x; i < n; i += kSpanThreads) {
    const int64_t w = i / 32;
    const uint32_t one = 1u << (i % 32), below = one - 1u, begins = RowSpans::begins(r.bits, w);
    const bool masked = (r.bits[w] & one) != 0, begin = (begins & one) != 0;
    const int64_t masked_before = r.masked_before[w] + __popc(r.bits[w] & below);
    const int64_t spans_before = r.spans_before[w] + __popc(begins & below);
    const T token = tokens[i];
    const int64_t in = i - masked_before + spans_before;
    if (!masked) inputs[in] = token;
    if (begin) inputs[in] = static_cast<T>(top - spans_before);
    if (a.ids.aligned) {
      const int64_t out = masked_before + spans_before;
      if (begin) targets[out] = static_cast<T>(top - spans_before);
      if (masked) targets[out + (begin ? 1 : 0)] = token;
      continue;
    }
    // Runs of kept tokens that have begun before this one: each begins the row or follows a span.
    const bool masked_last = i > 0 && bit_at(r.bits, i - 1);
    const int64_t runs_before =
        i == 0 ? 0 : spans_before + (r.begins_masked ? 0 : 1) - (masked_last ? 1 : 0);
    const int64_t out = masked_before + runs_before;
    if (masked) targets[out] = token;
    if (!masked && (i == 0 || masked_last)) targets[out] = static_cast<T>(top - runs_before);
  }
}

template <class T>
static __global__ void __launch_bounds__(kSpanThreads) span_corrupt_kernel(CorruptArgs a) {
  TENFOLD_DYNAMIC_SHARED(shared);
  TENFOLD_SHARED(int64_t, sums, kSpanThreads / 32);
  const int64_t row = blockIdx.x, n = row_length(a.lengths, row, a.width), words = bit_words(n);
  auto* const memory = row_memory(a.memory, a.ints, shared);
  auto* const bits = reinterpret_cast<uint32_t*>(memory);
  int32_t* const masked_before = memory + bit_words(a.width);
  int32_t* const spans_before = masked_before + bit_words(a.width);
  if (a.mask != nullptr) {
    const uint8_t* const mask = a.mask + row * a.mask_stride;
    block_flags(bits, n, [&](int64_t i) { return mask[i] != 0; });
  } else {
    const DrawMemory m(spans_before + bit_words(a.width), a.width);
    const SpanStream s = span_stream(a.draw.seed, a.draw.offset + static_cast<uint64_t>(row));
    block_draw(a.draw.rule, s, a.draw.roll, n, m, sums, bits);
  }
  const int64_t noise =
      block_ranks(words, masked_before, sums, [&](int64_t w) { return int64_t{__popc(bits[w])}; });
  const int64_t spans = block_ranks(words, spans_before, sums, [&](int64_t w) {
    return int64_t{__popc(RowSpans::begins(bits, w))};
  });
  const bool begins = n > 0 && bit_at(bits, 0), ends = n > 0 && bit_at(bits, n - 1);
  const int64_t kept = kept_runs_of(n, spans, begins, ends);
  SpanSizes size = span_sizes(a.ids, n, noise, spans, kept);
  auto* const inputs = static_cast<T*>(a.inputs) + row * a.max_inputs;
  auto* const targets = static_cast<T*>(a.targets) + row * a.max_targets;
  const bool fits = size.inputs <= a.max_inputs && size.targets <= a.max_targets &&
                    size.sentinels <= a.ids.num_sentinels;
  if (fits) {
    const RowSpans r{bits, masked_before, spans_before, begins};
    const auto* const tokens = static_cast<const T*>(a.tokens) + row * a.tokens_stride;
    write_row(a, r, n, tokens, inputs, targets);
  } else {
    size.inputs = size.targets = 0;
  }
  if (threadIdx.x == 0) {
    a.in_len[row] = fits ? static_cast<int32_t>(size.inputs) : -1;
    a.tgt_len[row] = fits ? static_cast<int32_t>(size.targets) : -1;
    if (fits) {
      const int64_t marks = a.ids.aligned ? spans : kept;
      inputs[size.inputs - 1] = targets[size.targets - 1] = static_cast<T>(a.ids.eos);
      if (a.ids.final_sentinel)
        targets[size.targets - 2] = static_cast<T>(a.ids.first_sentinel - marks);
    }
  }
  block_fill(inputs + size.inputs, a.max_inputs - size.inputs, static_cast<T>(a.ids.pad));
  block_fill(targets + size.targets, a.max_targets - size.targets,
             static_cast<T>(a.ids.target_pad));
}

// In shared memory, or what `room` gives.
template <class Args>
int64_t place_rows(Args& a, int64_t ints, const Room& room) {
  const int64_t bytes = 4 * ints;
  a.ints = ints;
  if (bytes <= kRowShared) return bytes;
  a.memory = static_cast<int32_t*>(room(bytes * a.rows));
  return 0;
}

// All but memory and ints.
inline void launch_span_mask(MaskArgs a, const Room& room, cudaStream_t stream) {
  if (a.rows == 0 || a.width == 0) return;
  const int64_t bytes = place_rows(a, bit_words(a.width) + draw_memory_ints(a.width), room);
  TENFOLD_LAUNCH_SHARED(span_mask_kernel, static_cast<unsigned>(a.rows), kSpanThreads, bytes,
                        kRowShared, stream, a);
}

template <class T>
void launch_span_corrupt(CorruptArgs a, const Room& room, cudaStream_t stream) {
  if (a.rows == 0) return;
  const int64_t drawn = a.mask != nullptr ? 0 : draw_memory_ints(a.width);
  const int64_t bytes = place_rows(a, 3 * bit_words(a.width) + drawn, room);
  TENFOLD_LAUNCH_SHARED(span_corrupt_kernel<T>, static_cast<unsigned>(a.rows), kSpanThreads, bytes,
                        kRowShared, stream, a);
}

}  // namespace tenfold::cuda
