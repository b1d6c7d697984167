// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of pair_pack and shift_right.
#include "corruption/pairs_ops.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace tenfold {
namespace {

Ragged check_ragged(const char* op, const char* arg, const Ragged& r, const Tensor& source,
                    int64_t rows) {
  const std::string offsets = std::string(arg) + "_offsets";
  check_same_dtype(op, "source", source, arg, r.values);
  check_dim(op, arg, r.values, 1, "[N], the tokens of all rows");
  check_same_device(op, "source", source, arg, r.values);
  check_int_dtype(op, offsets.c_str(), r.offsets);
  check_sizes(op, offsets.c_str(), r.offsets, {rows + 1}, "[B + 1]");
  check_same_device(op, "source", source, offsets.c_str(), r.offsets);
  Ragged made{as_contiguous(r.values), as_contiguous(r.offsets)};
  if (!source.is_cpu()) return made;
  const RowInts at(made.offsets);
  const int64_t n = r.values.numel();
  for (int64_t i = 0; i <= rows; ++i) {
    TENFOLD_CHECK_INDEX(at[i] >= 0 && at[i] <= n, "tenfold::", op, ": ", offsets, "[", i,
                        "] = ", at[i], " must be in [0, ", n, "], the tokens of ", arg);
    TENFOLD_CHECK_INDEX(i == 0 || at[i] >= at[i - 1], "tenfold::", op, ": ", offsets,
                        " must not fall, got ", i > 0 ? at[i - 1] : 0, " and then ", at[i], " at ",
                        i);
  }
  return made;
}

}  // namespace

PairCall check_pairs(const Ragged& source, const Ragged& target, const OptTensor& prefix,
                     const OptTensor& prefix_offsets, const PairIds& ids, int64_t max_inputs,
                     int64_t max_targets) {
  constexpr auto kOp = "pair_pack";
  const Tensor& s = source.values;
  check_int_dtype(kOp, "source", s);
  check_int_dtype(kOp, "source_offsets", source.offsets);
  check_dim(kOp, "source_offsets", source.offsets, 1, "[B + 1]");
  TENFOLD_CHECK_VALUE(source.offsets.numel() > 0, "tenfold::", kOp,
                      ": source_offsets must have an element at least, got [0]");
  TENFOLD_CHECK_VALUE(prefix.has_value() == prefix_offsets.has_value(), "tenfold::", kOp,
                      ": prefix and prefix_offsets must both be given, or both be None");
  check_id(kOp, "eos_id", ids.eos, s);
  check_id(kOp, "pad_id", ids.pad, s);
  check_id(kOp, "target_pad_id", ids.target_pad, s);
  check_columns(kOp, "max_inputs", max_inputs, 1);
  check_columns(kOp, "max_targets", max_targets, 1);
  const int64_t rows = source.offsets.numel() - 1;
  PairCall c{check_ragged(kOp, "source", source, s, rows),
             check_ragged(kOp, "target", target, s, rows),
             std::nullopt,
             ids,
             rows,
             max_inputs,
             max_targets,
             new_output(s, {rows, max_inputs}, s.scalar_type()),
             new_output(s, {rows}, ScalarType::Int),
             new_output(s, {rows, max_targets}, s.scalar_type()),
             new_output(s, {rows}, ScalarType::Int),
             new_output(s, {rows, 2}, ScalarType::Int)};
  if (prefix) c.prefix = check_ragged(kOp, "prefix", {*prefix, *prefix_offsets}, s, rows);
  return c;
}

ShiftCall check_shift(const Tensor& labels, int64_t start_id, int64_t pad_id,
                      int64_t ignore_index) {
  constexpr auto kOp = "shift_right";
  check_int_dtype(kOp, "labels", labels);
  check_dim(kOp, "labels", labels, 2, "[B, T]");
  check_id(kOp, "start_id", start_id, labels);
  check_id(kOp, "pad_id", pad_id, labels);
  check_id(kOp, "ignore_index", ignore_index, labels);
  const int64_t rows = labels.sizes()[0], width = labels.sizes()[1];
  return {with_contiguous_rows(labels),
          rows,
          width,
          start_id,
          pad_id,
          ignore_index,
          new_output(labels, {rows, width}, labels.scalar_type())};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "pair_pack(Tensor source, Tensor source_offsets, Tensor target, Tensor target_offsets, "
      "Tensor? prefix, Tensor? prefix_offsets, int eos_id, int pad_id, int max_inputs, "
      "int max_targets, *, int? target_pad_id=None) "
      "-> (Tensor inputs, Tensor in_len, Tensor targets, Tensor tgt_len, Tensor cut)");
  m.def(
      "shift_right(Tensor labels, int start_id=0, int pad_id=0, int ignore_index=-100) -> Tensor");
}
