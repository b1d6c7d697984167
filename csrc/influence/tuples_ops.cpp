// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of markov_onestep_tuples.
#include "influence/tuples_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {

TupleCall check_tuples(const char* op, const Tensor& h, const Tensor& g, const Tensor& order_rows,
                       const Tensor& test_rows, const Tensor& hist, bool residual,
                       const std::string& reduction) {
  check_factor_dtype(op, "H", h);
  check_same_dtype(op, "H", h, "G", g);
  check_dim(op, "H", h, 3, "[n + 1, M, E]");
  check_dim(op, "G", g, 3, "[n + 1, Q, E]");
  check_same_device(op, "H", h, "G", g);
  const int64_t planes = h.sizes()[0], dim = h.sizes()[2];
  TENFOLD_CHECK_VALUE(
      planes >= 2, "tenfold::", op,
      ": H must have 2 planes or more (one a lag, and the additive one), got shape ", shape_str(h));
  TENFOLD_CHECK_VALUE(g.sizes()[0] == planes && g.sizes()[2] == dim, "tenfold::", op,
                      ": G must be [", planes, ", Q, ", dim, "] to match H ", shape_str(h),
                      ", got ", shape_str(g));
  TENFOLD_CHECK_VALUE(h.sizes()[1] <= INT32_MAX && g.sizes()[1] <= INT32_MAX, "tenfold::", op,
                      ": H and G must have fewer than 2^31 rows a plane, got ", shape_str(h),
                      " and ", shape_str(g));
  check_int_dtype(op, "order_rows", order_rows);
  check_dim(op, "order_rows", order_rows, 2, "[N, B]");
  check_same_device(op, "H", h, "order_rows", order_rows);
  const int64_t count = order_rows.sizes()[0];
  check_int_dtype(op, "test_rows", test_rows);
  check_sizes(op, "test_rows", test_rows, {count}, "[N]");
  check_same_device(op, "H", h, "test_rows", test_rows);
  const Tensor past = check_real(op, "hist", hist, "H", h, {count, planes - 1}, "[N, n]");
  const bool mean = check_reduction(op, reduction);
  return {with_contiguous_rows(h),
          with_contiguous_rows(g),
          as_contiguous(order_rows),
          as_contiguous(test_rows),
          past,
          planes - 1,
          h.sizes()[1],
          g.sizes()[1],
          dim,
          count,
          order_rows.sizes()[1],
          residual,
          mean};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "markov_onestep_tuples(Tensor H, Tensor G, Tensor order_rows, Tensor test_rows, Tensor hist, "
      "*, bool residual=False, str reduction=\"sum\") -> Tensor pred");
  // Gradients that are not asked for are empty.
  m.def(
      "markov_onestep_tuples_backward(Tensor grad, Tensor H, Tensor G, Tensor order_rows, "
      "Tensor test_rows, Tensor hist, bool of_H, bool of_G, bool of_hist, *, "
      "bool residual=False, str reduction=\"sum\") "
      "-> (Tensor grad_H, Tensor grad_G, Tensor grad_hist)");
}
