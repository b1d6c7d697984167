// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of selective_logprob.
#include "loss/logprob_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {

LogprobCall check_logprob(const char* op, const Tensor& logits, const Tensor& ids,
                          double temperature) {
  check_float_dtype(op, "logits", logits);
  check_dim(op, "logits", logits, 2, "[N, V]");
  check_int_dtype(op, "ids", ids);
  TENFOLD_CHECK_VALUE(ids.dim() == 1 && ids.sizes()[0] == logits.sizes()[0], "tenfold::", op,
                      ": ids must be [", logits.sizes()[0], "], one per row of logits, got ",
                      shape_str(ids));
  check_same_device(op, "ids", ids, "logits", logits);
  TENFOLD_CHECK_VALUE(temperature > 0.0, "tenfold::", op, ": temperature must be above 0, got ",
                      temperature);
  TENFOLD_CHECK_VALUE(logits.sizes()[1] > 0 || logits.sizes()[0] == 0, "tenfold::", op,
                      ": logits must have at least one column, got ", shape_str(logits));
  const Tensor rows = with_contiguous_rows(logits);
  return {rows, ids.is_contiguous() ? ids : torch::stable::contiguous(ids), rows.sizes()[0],
          rows.sizes()[1], rows.sizes()[0] > 0 ? rows.strides()[0] : 0};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "selective_logprob(Tensor logits, Tensor ids, float temperature=1.0) "
      "-> (Tensor logp, Tensor lse, Tensor entropy)");
  m.def(
      "selective_logprob_backward(Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, "
      "Tensor logits, Tensor ids, Tensor lse, Tensor entropy, float temperature) -> Tensor");
}
