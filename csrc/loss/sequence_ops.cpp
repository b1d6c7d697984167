// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of sequence_nll.
#include <torch/csrc/stable/library.h>

#include "loss/logprob_ops.h"
#include "loss/sequence_nll.h"

namespace tenfold {

SequenceCall check_sequence(const char* op, const Tensor& logits, const Tensor& labels_in,
                            int64_t ignore_index) {
  check_float_dtype(op, "logits", logits);
  check_dim(op, "logits", logits, 3, "[B, S, V]");
  check_int_dtype(op, "labels", labels_in);
  const int64_t batch = logits.sizes()[0], length = logits.sizes()[1], vocab = logits.sizes()[2];
  check_sizes(op, "labels", labels_in, {batch, length}, "[B, S]");
  check_same_device(op, "logits", logits, "labels", labels_in);
  TENFOLD_CHECK_VALUE(vocab > 0 || batch * length == 0, "tenfold::", op,
                      ": logits must have at least one column, got ", shape_str(logits));
  SequenceCall c{with_contiguous_rows(logits),
                 labels_in.is_contiguous() ? labels_in : torch::stable::contiguous(labels_in),
                 batch,
                 length,
                 vocab,
                 ignore_index};
  for (int64_t i = 0; labels_in.is_cpu() && i < c.rows(); ++i) {
    const int64_t label = id_at(c.labels, i);
    TENFOLD_CHECK_INDEX(label == ignore_index || (label >= 0 && label < vocab), "tenfold::", op,
                        ": labels[", i / length, ", ", i % length, "] = ", label,
                        " is out of range for V = ", vocab,
                        "; positions that do not count have ignore_index = ", ignore_index);
  }
  return c;
}

Tensor check_sequence_floats(const char* op, const char* arg, const Tensor& t,
                             std::initializer_list<int64_t> sizes, const char* layout) {
  TENFOLD_CHECK_TYPE(t.scalar_type() == ScalarType::Float, "tenfold::", op, ": ", arg,
                     " must be float32, got ", dtype_name(t.scalar_type()));
  check_sizes(op, arg, t, sizes, layout);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "sequence_nll(Tensor logits, Tensor labels, int ignore_index=-100) "
      "-> (Tensor nll_sum, Tensor count)");
  // With the normalisers, float32 [B, S], which its backward needs; 0 at positions that do not
  // count.
  m.def(
      "sequence_nll_forward(Tensor logits, Tensor labels, int ignore_index=-100) "
      "-> (Tensor nll_sum, Tensor count, Tensor lse)");
  m.def(
      "sequence_nll_backward(Tensor grad, Tensor logits, Tensor labels, Tensor lse, "
      "int ignore_index=-100) -> Tensor");
}
