// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of span_mask, span_corrupt, span_corruption and span_restore.
#include "corruption/spans_ops.h"

#include <torch/csrc/stable/library.h>

#include <sstream>

namespace tenfold {
namespace {

MaskDraw check_draw(const char* op, double density, double mean_span, int64_t seed, int64_t offset,
                    bool roll) {
  TENFOLD_CHECK_VALUE(density >= 0.0 && density < 1.0, "tenfold::", op,
                      ": density must be in [0, 1), got ", density);
  TENFOLD_CHECK_VALUE(mean_span >= 1.0, "tenfold::", op, ": mean_span must be at least 1, got ",
                      mean_span);
  const SpanRule rule{static_cast<float>(density), static_cast<float>(mean_span), density == 0.0};
  return {rule, seed, static_cast<uint64_t>(offset), roll};
}

// What a row of n tokens needs at most: a roll may cut a span in two, or a run of kept tokens.
SpanSizes most_sizes(const CorruptCall& c, int64_t n) {
  const SpanCounts count = span_counts(c.draw->rule, n);
  const int64_t cut = c.draw->roll ? 1 : 0;
  if (count.spans == 0) return span_sizes(c.ids, n, 0, 0, n > 0 ? 1 : 0);
  return span_sizes(c.ids, n, count.noise, count.spans + cut, count.spans + cut);
}

// The largest row that surely has enough sentinels.
int64_t longest_row(const CorruptCall& c) {
  int64_t low = 0, high = kMostColumns;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const bool enough = most_sizes(c, middle).sentinels <= c.ids.num_sentinels;
    enough ? low = middle : high = middle - 1;
  }
  return low;
}

CorruptCall corrupt_call(const char* op, const Tensor& tokens, const Tensor& lengths,
                         const CorruptOptions& o) {
  const Tensor rows = check_tokens(op, "tokens", tokens);
  const int64_t count = tokens.sizes()[0], width = tokens.sizes()[1];
  check_sentinels(op, tokens, o.first_sentinel, o.num_sentinels, o.eos_id);
  check_id(op, "pad_id", o.pad_id, tokens);
  const int64_t target_pad = o.target_pad_id.value_or(o.pad_id);
  check_id(op, "target_pad_id", target_pad, tokens);
  check_columns(op, "max_inputs", o.max_inputs, 1);
  check_columns(op, "max_targets", o.max_targets, 1);
  CorruptCall c{op,
                rows,
                check_lengths(op, "lengths", lengths, "tokens", tokens, count, width),
                std::nullopt,
                std::nullopt,
                {o.first_sentinel, o.num_sentinels, o.eos_id, o.pad_id, target_pad, o.aligned,
                 o.final_sentinel},
                o.allow_sentinels,
                count,
                width,
                o.max_inputs,
                o.max_targets,
                new_output(tokens, {count, o.max_inputs}, tokens.scalar_type()),
                new_output(tokens, {count}, ScalarType::Int),
                new_output(tokens, {count, o.max_targets}, tokens.scalar_type()),
                new_output(tokens, {count}, ScalarType::Int)};
  return c;
}

}  // namespace

MaskCall check_mask(const Tensor& lengths, int64_t max_len, double density, double mean_span,
                    int64_t seed, int64_t offset, bool roll) {
  constexpr auto kOp = "span_mask";
  check_int_dtype(kOp, "lengths", lengths);
  check_dim(kOp, "lengths", lengths, 1, "[B]");
  check_columns(kOp, "max_len", max_len, 0);
  const MaskDraw draw = check_draw(kOp, density, mean_span, seed, offset, roll);
  const int64_t rows = lengths.sizes()[0];
  return {check_lengths(kOp, "lengths", lengths, "lengths", lengths, rows, max_len), draw, rows,
          max_len, new_output(lengths, {rows, max_len}, ScalarType::Bool)};
}

CorruptCall check_corrupt(const Tensor& tokens, const Tensor& lengths, const Tensor& mask,
                          const CorruptOptions& o) {
  constexpr auto kOp = "span_corrupt";
  CorruptCall c = corrupt_call(kOp, tokens, lengths, o);
  check_bytes(kOp, "mask", mask);
  check_sizes(kOp, "mask", mask, {c.rows, c.width}, "[B, L]");
  check_same_device(kOp, "tokens", tokens, "mask", mask);
  c.mask = with_contiguous_rows(mask);
  return c;
}

CorruptCall check_corruption(const Tensor& tokens, const Tensor& lengths, double density,
                             double mean_span, int64_t seed, int64_t offset, bool roll,
                             const CorruptOptions& o) {
  constexpr auto kOp = "span_corruption";
  const MaskDraw draw = check_draw(kOp, density, mean_span, seed, offset, roll);
  CorruptCall c = corrupt_call(kOp, tokens, lengths, o);
  c.draw = draw;
  if (!tokens.is_cpu() && c.rows > 0)
    check_fits(c, "a row of as many tokens as there are columns, ", c.width,
               most_sizes(c, c.width));
  return c;
}

void check_fits(const CorruptCall& c, const char* row, int64_t number, const SpanSizes& need) {
  TENFOLD_CHECK_VALUE(need.inputs <= c.max_inputs, "tenfold::", c.op, ": ", row, number, ", needs ",
                      need.inputs, " tokens of inputs, EOS included; max_inputs is ", c.max_inputs);
  TENFOLD_CHECK_VALUE(need.targets <= c.max_targets, "tenfold::", c.op, ": ", row, number,
                      ", needs ", need.targets, " tokens of targets, EOS included; max_targets is ",
                      c.max_targets);
  if (need.sentinels <= c.ids.num_sentinels) return;
  std::ostringstream most;
  if (c.draw) most << "; rows of at most " << longest_row(c) << " tokens have enough";
  raise(ErrorKind::value, "tenfold::", c.op, ": ", row, number, ", needs ", need.sentinels,
        " sentinels; num_sentinels is ", c.ids.num_sentinels, most.str());
}

RestoreCall check_restore(const Tensor& inputs, const Tensor& in_len, const Tensor& targets,
                          const Tensor& tgt_len, int64_t first_sentinel, int64_t num_sentinels,
                          int64_t eos_id, int64_t pad_id) {
  constexpr auto kOp = "span_restore";
  const Tensor in = check_tokens(kOp, "inputs", inputs),
               tgt = check_tokens(kOp, "targets", targets);
  check_same_dtype(kOp, "inputs", inputs, "targets", targets);
  const int64_t rows = inputs.sizes()[0], s = inputs.sizes()[1], t = targets.sizes()[1];
  check_sizes(kOp, "targets", targets, {rows, t}, "[B, T]");
  check_same_device(kOp, "inputs", inputs, "targets", targets);
  check_sentinels(kOp, inputs, first_sentinel, num_sentinels, eos_id);
  check_id(kOp, "pad_id", pad_id, inputs);
  const int64_t width = s + (t > 2 ? t - 2 : 0);
  check_columns(kOp, "columns of inputs and targets together", width, 0);
  return {in,
          check_lengths(kOp, "in_len", in_len, "inputs", inputs, rows, s),
          tgt,
          check_lengths(kOp, "tgt_len", tgt_len, "inputs", inputs, rows, t),
          rows,
          width,
          first_sentinel,
          num_sentinels,
          eos_id,
          pad_id,
          new_output(inputs, {rows, width}, inputs.scalar_type()),
          new_output(inputs, {rows}, ScalarType::Int)};
}

}  // namespace tenfold

// span_corruption is span_corrupt of what span_mask draws; the mask is not in memory.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "span_mask(Tensor lengths, int max_len, float density, float mean_span, int seed, "
      "int offset, bool roll=False) -> Tensor");
  m.def(
      "span_corrupt(Tensor tokens, Tensor lengths, Tensor mask, int first_sentinel, "
      "int num_sentinels, int eos_id, int pad_id, int max_inputs, int max_targets, "
      "bool aligned=True, bool final_sentinel=False, *, bool allow_sentinels=False, "
      "int? target_pad_id=None) -> (Tensor inputs, Tensor in_len, Tensor targets, Tensor tgt_len)");
  m.def(
      "span_corruption(Tensor tokens, Tensor lengths, float density, float mean_span, int seed, "
      "int offset, int first_sentinel, int num_sentinels, int eos_id, int pad_id, int max_inputs, "
      "int max_targets, bool roll=False, bool aligned=True, bool final_sentinel=False, *, "
      "bool allow_sentinels=False, int? target_pad_id=None) "
      "-> (Tensor inputs, Tensor in_len, Tensor targets, Tensor tgt_len)");
  m.def(
      "span_restore(Tensor inputs, Tensor in_len, Tensor targets, Tensor tgt_len, "
      "int first_sentinel, int num_sentinels, int eos_id, *, int pad_id=0) "
      "-> (Tensor tokens, Tensor lengths)");
}
