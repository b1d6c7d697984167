// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `corruption`, for ctypes. The launch code is the
// kernels' own.
#define TENFOLD_CUDA_EMU
#include "corruption/cuda/pairs_kernel.cuh"
#include "corruption/cuda/restore_kernel.cuh"
#include "entry.h"  // after the kernels

namespace {

template <class F>
void with_tokens(int64_t wide, F f) {
  wide != 0 ? f.template operator()<int64_t>() : f.template operator()<int32_t>();
}

// x: density mean_span. n: seed offset roll
SpanDraw draw_of(const double* x, const int64_t* n) {
  return {{static_cast<float>(x[0]), static_cast<float>(x[1]), x[0] == 0.0},
          n[0],
          static_cast<uint64_t>(n[1]),
          n[2] != 0};
}

}  // namespace

// n: lengths_wide rows width seed offset roll
API void emu_span_mask(const void* lengths, uint8_t* mask, const int64_t* n, const double* x) {
  Memory memory;
  MaskArgs a{};
  a.lengths = ints(lengths, n[0]), a.rows = n[1], a.width = n[2], a.draw = draw_of(x, n + 3);
  a.mask = mask;
  launch_span_mask(a, memory.room(), nullptr);
}

// in: tokens lengths mask; out: inputs in_len targets tgt_len. n: wide lengths_wide rows width
// tokens_stride mask_stride max_inputs max_targets seed offset roll first_sentinel num_sentinels
// eos pad target_pad aligned final
API void emu_span_corrupt(const void* const* in, void* const* out, const int64_t* n,
                          const double* x) {
  Memory memory;
  CorruptArgs a{};
  a.tokens = in[0], a.lengths = ints(in[1], n[1]), a.mask = static_cast<const uint8_t*>(in[2]);
  a.rows = n[2], a.width = n[3], a.tokens_stride = n[4], a.mask_stride = n[5];
  a.max_inputs = n[6], a.max_targets = n[7], a.draw = draw_of(x, n + 8);
  a.ids = {n[11], n[12], n[13], n[14], n[15], n[16] != 0, n[17] != 0};
  a.inputs = out[0], a.in_len = static_cast<int32_t*>(out[1]);
  a.targets = out[2], a.tgt_len = static_cast<int32_t*>(out[3]);
  with_tokens(n[0], [&]<class T>() { launch_span_corrupt<T>(a, memory.room(), nullptr); });
}

// in: inputs in_len targets tgt_len; out: tokens lengths. n: wide in_wide tgt_wide rows in_width
// tgt_width in_stride tgt_stride first_sentinel num_sentinels eos pad width
API void emu_span_restore(const void* const* in, void* const* out, const int64_t* n) {
  Memory memory;
  RestoreArgs a{};
  a.inputs = in[0], a.in_len = ints(in[1], n[1]), a.targets = in[2];
  a.tgt_len = ints(in[3], n[2]), a.rows = n[3], a.in_width = n[4], a.tgt_width = n[5];
  a.in_stride = n[6], a.tgt_stride = n[7], a.first_sentinel = n[8], a.num_sentinels = n[9];
  a.eos = n[10], a.pad = n[11], a.width = n[12];
  a.tokens = out[0], a.lengths = static_cast<int32_t*>(out[1]);
  with_tokens(n[0], [&]<class T>() { launch_span_restore<T>(a, memory.room(), nullptr); });
}

// in: source and offsets, target and offsets, prefix and offsets; out: inputs in_len targets
// tgt_len cut. n: wide, then of each side whether its offsets are and its tokens, rows max_inputs
// max_targets eos pad target_pad
API void emu_pair_pack(const void* const* in, void* const* out, const int64_t* n) {
  PairArgs a{};
  a.source = {in[0], ints(in[1], n[1]), n[2]};
  a.target = {in[2], ints(in[3], n[3]), n[4]};
  a.prefix = {in[4], ints(in[5], n[5]), n[6]};
  a.prefixed = in[5] != nullptr, a.rows = n[7], a.max_inputs = n[8], a.max_targets = n[9];
  a.ids = {n[10], n[11], n[12]};
  a.inputs = out[0], a.in_len = static_cast<int32_t*>(out[1]);
  a.targets = out[2], a.tgt_len = static_cast<int32_t*>(out[3]);
  a.cut = static_cast<int32_t*>(out[4]);
  with_tokens(n[0], [&]<class T>() { launch_pair_pack<T>(a, nullptr); });
}

// n: wide rows width stride start pad ignore
API void emu_shift_right(const void* labels, void* out, const int64_t* n) {
  const ShiftArgs a{labels, n[1], n[2], n[3], n[4], n[5], n[6], out};
  with_tokens(n[0], [&]<class T>() { launch_shift_right<T>(a, nullptr); });
}
