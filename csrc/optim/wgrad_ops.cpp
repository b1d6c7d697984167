// SPDX-License-Identifier: Apache-2.0
// Schema of linear_wgrad_rows and the argument checks shared by both backends.
#include "optim/wgrad_ops.h"

#include <torch/csrc/stable/library.h>

#include "core/tensor.h"

namespace tenfold {
namespace {

// [..., last] as [tokens, last] with contiguous rows; a view wherever the tokens have one stride.
Tensor as_rows(const Tensor& t, int64_t tokens) {
  const int64_t last = t.sizes()[t.dim() - 1];
  const Tensor plain = t.dim() == 2 ? with_contiguous_rows(t) : torch::stable::contiguous(t);
  return plain.dim() == 2 ? plain : torch::stable::view(plain, {tokens, last});
}

}  // namespace

WgradCall check_linear_wgrad_rows(const Tensor& grad_out, const Tensor& input, const Tensor& rows) {
  constexpr auto op = "linear_wgrad_rows";
  check_float_dtype(op, "input", input);
  check_same_dtype(op, "input", input, "grad_out", grad_out);
  check_same_device(op, "input", input, "grad_out", grad_out);
  check_int_dtype(op, "rows", rows);
  check_same_device(op, "input", input, "rows", rows);
  check_dim(op, "rows", rows, 1, "[R]");
  const int64_t dims = input.dim();
  bool fits = dims >= 1 && grad_out.dim() == dims;
  int64_t tokens = 1;
  for (int64_t i = 0; fits && i + 1 < dims; ++i) {
    fits = grad_out.sizes()[i] == input.sizes()[i];
    tokens *= input.sizes()[i];
  }
  TENFOLD_CHECK_VALUE(fits,
                      "tenfold::linear_wgrad_rows: grad_out [..., out] and input [..., in] must "
                      "agree in all but the last dimension, got grad_out ",
                      shape_str(grad_out), " and input ", shape_str(input));
  const int64_t num_out = grad_out.sizes()[dims - 1], num_in = input.sizes()[dims - 1];
  TENFOLD_CHECK_VALUE(rows.numel() <= num_out,
                      "tenfold::linear_wgrad_rows: rows must hold different rows of out = ",
                      num_out, ", got ", rows.numel(), " of them");
  return {as_rows(grad_out, tokens), as_rows(input, tokens), tokens, num_out, num_in, rows.numel()};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("linear_wgrad_rows(Tensor grad_out, Tensor input, Tensor rows) -> Tensor");
}
