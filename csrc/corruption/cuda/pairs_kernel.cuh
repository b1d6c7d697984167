// SPDX-License-Identifier: Apache-2.0
// Device code of pair_pack and shift_right (corruption/pairs.h): a block a row.
#pragma once

#include "core/convert.cuh"
#include "corruption/pairs.h"

namespace tenfold::cuda {

constexpr int kPairThreads = 256;

// Rows one after the other.
struct RaggedRows {
  const void* values;
  IntArray offsets;
  int64_t n;  // tokens in all

  // Where row i begins, and its length: offsets that are none are brought into the tokens.
  __device__ int64_t at(int64_t i) const {
    const int64_t offset = offsets[i];
    return offset < 0 ? 0 : offset > n ? n : offset;
  }
  __device__ int64_t length(int64_t i) const {
    const int64_t length = at(i + 1) - at(i);
    return length < 0 ? 0 : length;
  }
};

struct PairArgs {
  RaggedRows source, target, prefix;
  bool prefixed;
  PairIds ids;
  int64_t rows, max_inputs, max_targets;
  void *inputs, *targets;
  int32_t *in_len, *tgt_len, *cut;
};

template <class T>
__device__ inline void copy_part(T* to, const RaggedRows& rows, int64_t row, int64_t n) {
  const T* const from = static_cast<const T*>(rows.values) + rows.at(row);
  for (int64_t i = threadIdx.x; i < n; i += kPairThreads) to[i] = from[i];
}

// EOS at the end of `used` tokens, and padding; nothing but padding if it does not fit.
template <class T>
__device__ inline void pack_side(T* row, bool fits, int64_t used, int64_t width, int64_t eos,
                                 int64_t pad) {
  if (threadIdx.x == 0 && fits) row[used - 1] = static_cast<T>(eos);
  for (int64_t i = (fits ? used : 0) + threadIdx.x; i < width; i += kPairThreads)
    row[i] = static_cast<T>(pad);
}

// Blocks of even numbers write inputs, the others targets.
template <class T>
static __global__ void __launch_bounds__(kPairThreads) pair_pack_kernel(PairArgs a) {
  const int64_t row = blockIdx.x / 2, source = a.source.length(row), target = a.target.length(row);
  const PairSizes s = pair_sizes(a.prefixed ? a.prefix.length(row) : 0, source, target,
                                 a.max_inputs, a.max_targets);
  if (blockIdx.x % 2 == 0) {
    auto* const inputs = static_cast<T*>(a.inputs) + row * a.max_inputs;
    if (s.fits && a.prefixed) copy_part(inputs, a.prefix, row, s.prefix);
    if (s.fits) copy_part(inputs + s.prefix, a.source, row, s.source);
    pack_side(inputs, s.fits, s.inputs, a.max_inputs, a.ids.eos, a.ids.pad);
    if (threadIdx.x != 0) return;
    a.in_len[row] = s.fits ? static_cast<int32_t>(s.inputs) : -1;
    a.cut[2 * row] = static_cast<int32_t>(s.fits ? source - s.source : source);
  } else {
    auto* const targets = static_cast<T*>(a.targets) + row * a.max_targets;
    if (s.fits) copy_part(targets, a.target, row, s.target);
    pack_side(targets, s.fits, s.targets, a.max_targets, a.ids.eos, a.ids.target_pad);
    if (threadIdx.x != 0) return;
    a.tgt_len[row] = s.fits ? static_cast<int32_t>(s.targets) : -1;
    a.cut[2 * row + 1] = static_cast<int32_t>(s.fits ? target - s.target : target);
  }
}

template <class T>
void launch_pair_pack(const PairArgs& a, cudaStream_t stream) {
  if (a.rows > 0)
    TENFOLD_LAUNCH(pair_pack_kernel<T>, static_cast<unsigned>(2 * a.rows), kPairThreads, stream, a);
}

struct ShiftArgs {
  const void* labels;
  int64_t rows, width, stride, start, pad, ignore;
  void* out;  // [rows, width]
};

template <class T>
static __global__ void __launch_bounds__(kPairThreads) shift_right_kernel(ShiftArgs a) {
  const int64_t row = blockIdx.x;
  const T* const labels = static_cast<const T*>(a.labels) + row * a.stride;
  T* const out = static_cast<T*>(a.out) + row * a.width;
  for (int64_t i = threadIdx.x; i < a.width; i += kPairThreads) {
    const int64_t before = i > 0 ? static_cast<int64_t>(labels[i - 1]) : a.start;
    out[i] = static_cast<T>(i > 0 && before == a.ignore ? a.pad : before);
  }
}

template <class T>
void launch_shift_right(const ShiftArgs& a, cudaStream_t stream) {
  if (a.rows > 0 && a.width > 0)
    TENFOLD_LAUNCH(shift_right_kernel<T>, static_cast<unsigned>(a.rows), kPairThreads, stream, a);
}

}  // namespace tenfold::cuda
