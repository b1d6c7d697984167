// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the ops on spans share.
#pragma once

#include <optional>
#include <tuple>

#include "corruption/rows_ops.h"
#include "corruption/spans.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// Of span_mask, and of the mask that span_corruption draws.
struct MaskDraw {
  SpanRule rule;
  int64_t seed;
  uint64_t offset;  // stream of the first row
  bool roll;

  SpanStream stream(int64_t row) const {
    return span_stream(seed, offset + static_cast<uint64_t>(row));
  }
};

struct MaskCall {
  Tensor lengths;  // contiguous
  MaskDraw draw;
  int64_t rows, width;
  Tensor mask;  // bool [B, width]
};
MaskCall check_mask(const Tensor& lengths, int64_t max_len, double density, double mean_span,
                    int64_t seed, int64_t offset, bool roll);

struct CorruptCall {
  const char* op;
  Tensor tokens, lengths;        // with contiguous rows; contiguous
  OptTensor mask;                // with contiguous rows; none: drawn
  std::optional<MaskDraw> draw;  // none: there is a mask
  SpanIds ids;
  bool allow_sentinels;
  int64_t rows, width, max_inputs, max_targets;
  Tensor inputs, in_len, targets, tgt_len;
};
struct CorruptOptions {
  int64_t first_sentinel, num_sentinels, eos_id, pad_id, max_inputs, max_targets;
  bool aligned, final_sentinel, allow_sentinels;
  std::optional<int64_t> target_pad_id;
};
CorruptCall check_corrupt(const Tensor& tokens, const Tensor& lengths, const Tensor& mask,
                          const CorruptOptions& o);
CorruptCall check_corruption(const Tensor& tokens, const Tensor& lengths, double density,
                             double mean_span, int64_t seed, int64_t offset, bool roll,
                             const CorruptOptions& o);

// Raises what a row does not fit in, if it does not.
void check_fits(const CorruptCall& c, const char* row, int64_t number, const SpanSizes& need);

struct RestoreCall {
  Tensor inputs, in_len, targets, tgt_len;  // with contiguous rows; contiguous
  int64_t rows, width, first_sentinel, num_sentinels, eos, pad;
  Tensor tokens, lengths;
};
RestoreCall check_restore(const Tensor& inputs, const Tensor& in_len, const Tensor& targets,
                          const Tensor& tgt_len, int64_t first_sentinel, int64_t num_sentinels,
                          int64_t eos_id, int64_t pad_id);

// The ops, with what a backend runs.
template <auto kMask, auto kCorrupt, auto kRestore>
struct SpanOps {
  using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Tensor mask(Tensor lengths, int64_t max_len, double density, double mean_span,
                     int64_t seed, int64_t offset, bool roll) {
    const MaskCall c = check_mask(lengths, max_len, density, mean_span, seed, offset, roll);
    kMask(c);
    return c.mask;
  }
  static Four corrupted(const CorruptCall& c) {
    kCorrupt(c);
    return {c.inputs, c.in_len, c.targets, c.tgt_len};
  }
  static Four corrupt(Tensor tokens, Tensor lengths, Tensor mask, int64_t first_sentinel,
                      int64_t num_sentinels, int64_t eos_id, int64_t pad_id, int64_t max_inputs,
                      int64_t max_targets, bool aligned, bool final_sentinel, bool allow_sentinels,
                      std::optional<int64_t> target_pad_id) {
    return corrupted(
        check_corrupt(tokens, lengths, mask,
                      {first_sentinel, num_sentinels, eos_id, pad_id, max_inputs, max_targets,
                       aligned, final_sentinel, allow_sentinels, target_pad_id}));
  }
  static Four corruption(Tensor tokens, Tensor lengths, double density, double mean_span,
                         int64_t seed, int64_t offset, int64_t first_sentinel,
                         int64_t num_sentinels, int64_t eos_id, int64_t pad_id, int64_t max_inputs,
                         int64_t max_targets, bool roll, bool aligned, bool final_sentinel,
                         bool allow_sentinels, std::optional<int64_t> target_pad_id) {
    return corrupted(
        check_corruption(tokens, lengths, density, mean_span, seed, offset, roll,
                         {first_sentinel, num_sentinels, eos_id, pad_id, max_inputs, max_targets,
                          aligned, final_sentinel, allow_sentinels, target_pad_id}));
  }
  static std::tuple<Tensor, Tensor> restore(Tensor inputs, Tensor in_len, Tensor targets,
                                            Tensor tgt_len, int64_t first_sentinel,
                                            int64_t num_sentinels, int64_t eos_id, int64_t pad_id) {
    const RestoreCall c = check_restore(inputs, in_len, targets, tgt_len, first_sentinel,
                                        num_sentinels, eos_id, pad_id);
    kRestore(c);
    return {c.tokens, c.lengths};
  }
};

}  // namespace tenfold
