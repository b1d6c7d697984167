// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of pair_pack and shift_right share.
#pragma once

#include <optional>
#include <tuple>

#include "corruption/pairs.h"
#include "corruption/rows_ops.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// Rows one after the other; contiguous.
struct Ragged {
  Tensor values, offsets;
};

struct PairCall {
  Ragged source, target;
  std::optional<Ragged> prefix;
  PairIds ids;
  int64_t rows, max_inputs, max_targets;
  Tensor inputs, in_len, targets, tgt_len, cut;
};
PairCall check_pairs(const Ragged& source, const Ragged& target, const OptTensor& prefix,
                     const OptTensor& prefix_offsets, const PairIds& ids, int64_t max_inputs,
                     int64_t max_targets);

struct ShiftCall {
  Tensor labels;  // with contiguous rows
  int64_t rows, width, start, pad, ignore;
  Tensor out;
};
ShiftCall check_shift(const Tensor& labels, int64_t start_id, int64_t pad_id, int64_t ignore_index);

// The ops, with what a backend runs.
template <auto kPack, auto kShift>
struct PairOps {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack(
      Tensor source, Tensor source_offsets, Tensor target, Tensor target_offsets, OptTensor prefix,
      OptTensor prefix_offsets, int64_t eos_id, int64_t pad_id, int64_t max_inputs,
      int64_t max_targets, std::optional<int64_t> target_pad_id) {
    const PairCall c =
        check_pairs({source, source_offsets}, {target, target_offsets}, prefix, prefix_offsets,
                    {eos_id, pad_id, target_pad_id.value_or(pad_id)}, max_inputs, max_targets);
    kPack(c);
    return {c.inputs, c.in_len, c.targets, c.tgt_len, c.cut};
  }
  static Tensor shift(Tensor labels, int64_t start_id, int64_t pad_id, int64_t ignore_index) {
    const ShiftCall c = check_shift(labels, start_id, pad_id, ignore_index);
    kShift(c);
    return c.out;
  }
};

}  // namespace tenfold
