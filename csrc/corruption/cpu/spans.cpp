// SPDX-License-Identifier: Apache-2.0
// CPU registration of the ops on spans: a row a task.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <utility>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "corruption/cpu/first_bad.h"
#include "corruption/spans_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerToken = 5e-4;
constexpr int64_t kRowTokens = 200;  // what a row costs beside its tokens
constexpr int64_t kSlack = 128;      // elements that a vector pass may touch past the last one

double row_micros(int64_t tokens) {
  return kMicrosPerToken * static_cast<double>(tokens + kRowTokens);
}

// Buffers for rows of up to n tokens: at most half of them are cuts.
class RowMemory {
 public:
  explicit RowMemory(int64_t n)
      : half_(n / 2 + kSlack), whole_(n + kSlack), memory_(4 * (3 * half_ + 2 * whole_) + whole_) {
    auto* at = static_cast<int32_t*>(memory_.data());
    const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    buffers.words = reinterpret_cast<uint32_t*>(take(half_));
    buffers.noise_cuts = take(half_), buffers.kept_cuts = take(half_);
    buffers.edges = take(whole_), buffers.spare = take(whole_);
    buffers.marks = reinterpret_cast<uint8_t*>(at);
  }
  SpanBuffers buffers{};

 private:
  int64_t half_, whole_;
  Scratch memory_;
};

int64_t make_spans(const CorruptCall& c, const RowInts& lengths, int64_t row,
                   const SpanBuffers& buf) {
  const int64_t n = lengths[row];
  if (c.draw)
    return TENFOLD_ISA_CALL(draw_spans, c.draw->rule, c.draw->stream(row), c.draw->roll, n, buf);
  const auto* const mask = static_cast<const uint8_t*>(c.mask->data_ptr());
  return TENFOLD_ISA_CALL(find_spans, mask + row * row_stride(*c.mask), n, buf.edges);
}

SpanSizes sizes_of(const CorruptCall& c, int64_t n, const int32_t* edges, int64_t spans) {
  int64_t noise = 0;
  for (int64_t j = 0; j < spans; ++j) noise += edges[2 * j + 1] - edges[2 * j];
  const bool begins = spans > 0 && edges[0] == 0, ends = spans > 0 && edges[2 * spans - 1] == n;
  return span_sizes(c.ids, n, noise, spans, kept_runs_of(n, spans, begins, ends));
}

class Corrupter {
 public:
  explicit Corrupter(const CorruptCall& c)
      : c_(c), tokens_(c.tokens), lengths_(c.lengths), stride_(row_stride(c.tokens)) {}

  // Whether the row was good.
  bool run(int64_t row, const SpanBuffers& buf) const {
    const int64_t n = lengths_[row], spans = make_spans(c_, lengths_, row, buf);
    const SpanSizes need = sizes_of(c_, n, buf.edges, spans);
    if (need.inputs > c_.max_inputs || need.targets > c_.max_targets ||
        need.sentinels > c_.ids.num_sentinels)
      return false;
    const char* const tokens = tokens_.at(row * stride_);
    if (!raw(tokens, n)) return false;
    const int64_t size = tokens_.wide() ? 8 : 4;
    TENFOLD_ISA_CALL(corrupt_row,
                     {tokens, tokens_.wide(), n, c_.width, buf.edges, spans, buf.spare,
                      static_cast<char*>(c_.inputs.data_ptr()) + row * c_.max_inputs * size,
                      static_cast<char*>(c_.targets.data_ptr()) + row * c_.max_targets * size,
                      c_.max_inputs, c_.max_targets, c_.ids});
    data_as<int32_t>(c_.in_len)[row] = static_cast<int32_t>(need.inputs);
    data_as<int32_t>(c_.tgt_len)[row] = static_cast<int32_t>(need.targets);
    return true;
  }

  [[noreturn]] void refuse(int64_t row) const {
    RowMemory memory(c_.width);
    const int64_t n = lengths_[row], spans = make_spans(c_, lengths_, row, memory.buffers);
    check_fits(c_, "row ", row, sizes_of(c_, n, memory.buffers.edges, spans));
    const int64_t lowest = lowest_sentinel();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = tokens_[row * stride_ + i];
      TENFOLD_CHECK_INDEX(token >= 0, "tenfold::", c_.op, ": tokens[", row, ", ", i, "] = ", token,
                          " is below 0");
      TENFOLD_CHECK_VALUE(c_.allow_sentinels || token < lowest || token > c_.ids.first_sentinel,
                          "tenfold::", c_.op, ": tokens[", row, ", ", i, "] = ", token,
                          " is a sentinel (", lowest, " to ", c_.ids.first_sentinel,
                          "), and such a row cannot be restored; allow_sentinels takes it");
    }
    raise(ErrorKind::runtime, "tenfold::", c_.op, ": tokens changed while they were read");
  }

 private:
  int64_t lowest_sentinel() const { return c_.ids.first_sentinel - c_.ids.num_sentinels + 1; }
  bool raw(const char* tokens, int64_t n) const {
    return TENFOLD_ISA_CALL(raw_tokens, tokens, tokens_.wide(), n, lowest_sentinel(),
                            c_.allow_sentinels ? 0 : c_.ids.num_sentinels);
  }

  const CorruptCall& c_;
  const RowInts tokens_, lengths_;
  const int64_t stride_;
};

void run_corrupt(const CorruptCall& c) {
  const Corrupter corrupter(c);
  std::atomic<int64_t> bad{c.rows};
  parallel_for(c.rows, row_micros(c.width), [&](int64_t begin, int64_t end) {
    const RowMemory memory(c.width);
    for (int64_t row = begin; row < end; ++row)
      if (!corrupter.run(row, memory.buffers)) lower(bad, row);
  });
  if (bad < c.rows) corrupter.refuse(bad);
}

void run_mask(const MaskCall& c) {
  const RowInts lengths(c.lengths);
  auto* const mask = static_cast<uint8_t*>(c.mask.data_ptr());
  parallel_for(c.rows, row_micros(c.width / 2), [&](int64_t begin, int64_t end) {
    const RowMemory memory(c.width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t spans = TENFOLD_ISA_CALL(draw_spans, c.draw.rule, c.draw.stream(row),
                                             c.draw.roll, lengths[row], memory.buffers);
      TENFOLD_ISA_CALL(write_mask, memory.buffers.edges, spans, c.width, mask + row * c.width);
    }
  });
}

void run_restore(const RestoreCall& c) {
  const RowInts inputs(c.inputs), targets(c.targets), in_len(c.in_len), tgt_len(c.tgt_len);
  const int64_t size = inputs.wide() ? 8 : 4;
  auto* const lengths = data_as<int32_t>(c.lengths);
  parallel_for(c.rows, row_micros(2 * c.width), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> spans(static_cast<size_t>(2 * c.num_sentinels), -1);
    for (int64_t row = begin; row < end; ++row) {
      const RestoreRow r{inputs.at(row * row_stride(c.inputs)),
                         targets.at(row * row_stride(c.targets)),
                         inputs.wide(),
                         in_len[row],
                         tgt_len[row],
                         c.inputs.sizes()[1],
                         c.targets.sizes()[1],
                         c.first_sentinel,
                         c.num_sentinels,
                         c.eos,
                         c.pad,
                         spans.data(),
                         static_cast<char*>(c.tokens.data_ptr()) + row * c.width * size,
                         c.width};
      lengths[row] = static_cast<int32_t>(TENFOLD_ISA_CALL(restore_row, r));
    }
  });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::SpanOps<&tenfold::cpu::run_mask, &tenfold::cpu::run_corrupt,
                               &tenfold::cpu::run_restore>;
  m.impl("span_mask", TORCH_BOX(&Ops::mask));
  m.impl("span_corrupt", TORCH_BOX(&Ops::corrupt));
  m.impl("span_corruption", TORCH_BOX(&Ops::corruption));
  m.impl("span_restore", TORCH_BOX(&Ops::restore));
}
