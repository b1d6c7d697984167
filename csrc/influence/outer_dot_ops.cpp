// SPDX-License-Identifier: Apache-2.0
// Schema and checks of outer_dot.
#include "influence/outer_dot_ops.h"

#include <torch/csrc/stable/library.h>

#include <initializer_list>

namespace tenfold {
namespace {

constexpr auto kOp = "outer_dot";

// Size of a dim counted from the last one; 1 of examples that there are not.
int64_t size_of(const Tensor& t, int64_t from_last) {
  return from_last < t.dim() ? t.sizes()[t.dim() - 1 - from_last] : 1;
}

void check_tokens(const char* name, const Tensor& t, const char* of_name, const Tensor& of) {
  TENFOLD_CHECK_VALUE(
      t.dim() == of.dim() && size_of(t, 1) == size_of(of, 1) && size_of(t, 2) == size_of(of, 2),
      "tenfold::", kOp, ": ", name, " must have the examples and tokens of ", of_name, " ",
      shape_str(of), ", got ", shape_str(t));
}

}  // namespace

OuterDotCall check_outer_dot(const Tensor& j, const Tensor& x, const Tensor& j2, const Tensor& x2,
                             bool paired) {
  check_float_dtype(kOp, "J", j);
  const Tensor* const others[] = {&x, &j2, &x2};
  const char* const names[] = {"X", "J2", "X2"};
  for (int i = 0; i < 3; ++i) {
    check_same_dtype(kOp, "J", j, names[i], *others[i]);
    check_same_device(kOp, "J", j, names[i], *others[i]);
  }
  TENFOLD_CHECK_VALUE(j.dim() == 2 || j.dim() == 3, "tenfold::", kOp,
                      ": J must be [N, T, V], or [T, V] of one example, got shape ", shape_str(j));
  check_tokens("X", x, "J", j);
  TENFOLD_CHECK_VALUE(j2.dim() == j.dim() && size_of(j2, 0) == size_of(j, 0), "tenfold::", kOp,
                      ": J2 must be ", j.dim() == 3 ? "[M, S, " : "[S, ", size_of(j, 0),
                      "] to match J ", shape_str(j), ", got ", shape_str(j2));
  check_tokens("X2", x2, "J2", j2);
  TENFOLD_CHECK_VALUE(size_of(x2, 0) == size_of(x, 0), "tenfold::", kOp,
                      ": X2 must have the width ", size_of(x, 0), " of X ", shape_str(x), ", got ",
                      shape_str(x2));
  TENFOLD_CHECK_VALUE(!paired || size_of(j, 2) == size_of(j2, 2), "tenfold::", kOp,
                      ": J2 must have as many examples as J where paired is True, got ",
                      size_of(j2, 2), " and ", size_of(j, 2));
  const bool single = j.dim() == 2;
  return {with_contiguous_rows(j),
          with_contiguous_rows(x),
          with_contiguous_rows(j2),
          with_contiguous_rows(x2),
          size_of(j, 2),
          size_of(j, 1),
          size_of(j2, 2),
          size_of(j2, 1),
          size_of(j, 0),
          size_of(x, 0),
          paired || single,
          single};
}

TokenRows token_rows(const Tensor& t) {
  const auto strides = t.strides();
  const int64_t dims = t.dim();
  return {t.data_ptr(), dims == 3 ? strides[0] : 0, strides[dims - 2]};
}

Tensor new_scores(const OuterDotCall& c) {
  if (c.single) return new_output(c.j, std::initializer_list<int64_t>{}, ScalarType::Float);
  if (c.paired) return new_output(c.j, {c.n}, ScalarType::Float);
  return new_output(c.j, {c.n, c.m}, ScalarType::Float);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("outer_dot(Tensor J, Tensor X, Tensor J2, Tensor X2, *, bool paired=False) -> Tensor");
}
