// SPDX-License-Identifier: Apache-2.0
// CUDA registration of the ops on spans. Values are not checked: lengths are brought into the row,
// tokens are copied as they are, a row that does not fit has lengths of -1.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "corruption/cuda/ints.h"
#include "corruption/cuda/restore_kernel.cuh"
#include "corruption/cuda/spans_kernel.cuh"
#include "corruption/spans_ops.h"

namespace tenfold::cuda {
namespace {

SpanDraw draw_of(const MaskDraw& d) {
  return {d.rule, d.seed, d.offset, d.roll};
}

void run_mask(const MaskCall& c) {
  check_grid("span_mask", c.rows);
  const Launch launch(c.lengths);
  DeviceMemory memory(c.lengths);
  MaskArgs a{};
  a.lengths = contiguous_ints(c.lengths), a.draw = draw_of(c.draw);
  a.rows = c.rows, a.width = c.width, a.mask = static_cast<uint8_t*>(c.mask.data_ptr());
  launch_span_mask(a, memory.room(), launch.stream);
  launch.check();
}

void run_corrupt(const CorruptCall& c) {
  check_grid(c.op, c.rows);
  const Launch launch(c.tokens);
  DeviceMemory memory(c.tokens);
  CorruptArgs a{};
  a.tokens = c.tokens.data_ptr(), a.lengths = contiguous_ints(c.lengths);
  if (c.mask) {
    a.mask = static_cast<const uint8_t*>(c.mask->data_ptr()), a.mask_stride = row_stride(*c.mask);
  } else {
    a.draw = draw_of(*c.draw);
  }
  a.ids = c.ids, a.rows = c.rows, a.width = c.width, a.tokens_stride = row_stride(c.tokens);
  a.max_inputs = c.max_inputs, a.max_targets = c.max_targets;
  a.inputs = c.inputs.data_ptr(), a.targets = c.targets.data_ptr();
  a.in_len = data_as<int32_t>(c.in_len), a.tgt_len = data_as<int32_t>(c.tgt_len);
  dispatch_tokens(c.tokens,
                  [&]<class T>() { launch_span_corrupt<T>(a, memory.room(), launch.stream); });
  launch.check();
}

void run_restore(const RestoreCall& c) {
  check_grid("span_restore", c.rows);
  const Launch launch(c.inputs);
  DeviceMemory memory(c.inputs);
  RestoreArgs a{};
  a.inputs = c.inputs.data_ptr(), a.targets = c.targets.data_ptr();
  a.in_len = contiguous_ints(c.in_len), a.tgt_len = contiguous_ints(c.tgt_len);
  a.rows = c.rows, a.in_width = c.inputs.sizes()[1], a.tgt_width = c.targets.sizes()[1];
  a.in_stride = row_stride(c.inputs), a.tgt_stride = row_stride(c.targets);
  a.first_sentinel = c.first_sentinel, a.num_sentinels = c.num_sentinels;
  a.eos = c.eos, a.pad = c.pad, a.tokens = c.tokens.data_ptr(), a.width = c.width;
  a.lengths = data_as<int32_t>(c.lengths);
  dispatch_tokens(c.inputs,
                  [&]<class T>() { launch_span_restore<T>(a, memory.room(), launch.stream); });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::SpanOps<&tenfold::cuda::run_mask, &tenfold::cuda::run_corrupt,
                               &tenfold::cuda::run_restore>;
  m.impl("span_mask", TORCH_BOX(&Ops::mask));
  m.impl("span_corrupt", TORCH_BOX(&Ops::corrupt));
  m.impl("span_corruption", TORCH_BOX(&Ops::corruption));
  m.impl("span_restore", TORCH_BOX(&Ops::restore));
}
