// SPDX-License-Identifier: Apache-2.0
// CUDA registration of pair_pack and shift_right. Values are not checked: offsets are brought into
// the tokens, tokens are copied as they are, a row whose prefix does not fit has lengths of -1.
#include <torch/csrc/stable/library.h>

#include "core/cuda_args.h"
#include "core/stream.h"
#include "corruption/cuda/ints.h"
#include "corruption/cuda/pairs_kernel.cuh"
#include "corruption/pairs_ops.h"

namespace tenfold::cuda {
namespace {

RaggedRows ragged_rows(const Ragged& r) {
  return {r.values.data_ptr(), contiguous_ints(r.offsets), r.values.numel()};
}

void run_pack(const PairCall& c) {
  check_grid("pair_pack", 2 * c.rows);
  const Launch launch(c.inputs);
  PairArgs a{};
  a.source = ragged_rows(c.source), a.target = ragged_rows(c.target);
  a.prefixed = c.prefix.has_value();
  if (a.prefixed) a.prefix = ragged_rows(*c.prefix);
  a.ids = c.ids, a.rows = c.rows, a.max_inputs = c.max_inputs, a.max_targets = c.max_targets;
  a.inputs = c.inputs.data_ptr(), a.targets = c.targets.data_ptr();
  a.in_len = data_as<int32_t>(c.in_len), a.tgt_len = data_as<int32_t>(c.tgt_len);
  a.cut = data_as<int32_t>(c.cut);
  dispatch_tokens(c.inputs, [&]<class T>() { launch_pair_pack<T>(a, launch.stream); });
  launch.check();
}

void run_shift(const ShiftCall& c) {
  check_grid("shift_right", c.rows);
  const Launch launch(c.labels);
  const ShiftArgs a{
      c.labels.data_ptr(), c.rows, c.width, row_stride(c.labels), c.start, c.pad, c.ignore,
      c.out.data_ptr()};
  dispatch_tokens(c.labels, [&]<class T>() { launch_shift_right<T>(a, launch.stream); });
  launch.check();
}

}  // namespace
}  // namespace tenfold::cuda

STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  using Ops = tenfold::PairOps<&tenfold::cuda::run_pack, &tenfold::cuda::run_shift>;
  m.impl("pair_pack", TORCH_BOX(&Ops::pack));
  m.impl("shift_right", TORCH_BOX(&Ops::shift));
}
