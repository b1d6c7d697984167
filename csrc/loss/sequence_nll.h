// SPDX-License-Identifier: Apache-2.0
// sequence_nll (UpIT section 7): what a model gives whole sequences. Of logits [B, S, V] and labels
// [B, S], with the normaliser of selective_logprob,
//
//   nll_sum[b] = sum over positions that count of lse - x[label],   count[b] = how many those are
//
// A position with ignore_index is not read. Rows of logits are read once, where they lie: slices
// such as logits[:, :-1] are not copied.
#pragma once

#include <optional>

#include "core/check.h"
#include "core/tensor.h"

namespace tenfold {

struct SequenceCall {
  Tensor logits, labels;  // [B, S, V] with contiguous rows; [B, S], contiguous
  int64_t batch, length, vocab, ignore_index;

  int64_t rows() const { return batch * length; }
};

// On a CPU the labels' values are checked.
SequenceCall check_sequence(const char* op, const Tensor& logits, const Tensor& labels,
                            int64_t ignore_index);

// A contiguous float32 argument of the backward.
Tensor check_sequence_floats(const char* op, const char* arg, const Tensor& t,
                             std::initializer_list<int64_t> sizes, const char* layout);

}  // namespace tenfold
