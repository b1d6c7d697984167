// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of markov_scan and markov_onestep.
#include "influence/markov_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {

ScalarType real_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_factor_dtype(const char* op, const char* arg, const Tensor& t) {
  const ScalarType s = t.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Double,
                     "tenfold::", op, ": ", arg, " must be float32, bfloat16 or float64, got ",
                     dtype_name(s));
}

bool check_reduction(const char* op, const std::string& reduction) {
  TENFOLD_CHECK_VALUE(reduction == "sum" || reduction == "mean", "tenfold::", op,
                      ": reduction must be sum or mean, got '", reduction, "'");
  return reduction == "mean";
}

Tensor check_real(const char* op, const char* arg, const Tensor& t, const char* like_name,
                  const Tensor& like, std::initializer_list<int64_t> sizes, const char* layout) {
  const ScalarType want = real_of(like);
  TENFOLD_CHECK_TYPE(t.scalar_type() == want, "tenfold::", op, ": ", arg, " must be ",
                     dtype_name(want), " where ", like_name, " is ", dtype_name(like.scalar_type()),
                     ", got ", dtype_name(t.scalar_type()));
  check_sizes(op, arg, t, sizes, layout);
  check_same_device(op, like_name, like, arg, t);
  return with_contiguous_rows(t);
}

MarkovCall check_markov(const char* op, const Tensor& factors, const Tensor& order, bool residual,
                        const OptTensor& lengths, const std::string& reduction) {
  check_factor_dtype(op, "factors", factors);
  check_dim(op, "factors", factors, 3, "[n + 1, M, Q]");
  const int64_t planes = factors.sizes()[0], rows = factors.sizes()[1];
  TENFOLD_CHECK_VALUE(planes >= 2, "tenfold::", op,
                      ": factors must have 2 planes or more (one a lag, and the additive one), got "
                      "shape ",
                      shape_str(factors));
  TENFOLD_CHECK_VALUE(rows <= INT32_MAX, "tenfold::", op,
                      ": factors must have fewer than 2^31 training examples, got ", rows);
  check_int_dtype(op, "order", order);
  check_dim(op, "order", order, 3, "[R, T, B]");
  check_same_device(op, "factors", factors, "order", order);
  const int64_t runs = order.sizes()[0];
  if (lengths) {
    check_int_dtype(op, "lengths", *lengths);
    check_sizes(op, "lengths", *lengths, {runs}, "[R]");
    check_same_device(op, "factors", factors, "lengths", *lengths);
  }
  const bool mean = check_reduction(op, reduction);
  return {with_contiguous_rows(factors),
          as_contiguous(order),
          lengths ? OptTensor(as_contiguous(*lengths)) : OptTensor(),
          planes - 1,
          rows,
          factors.sizes()[2],
          runs,
          order.sizes()[1],
          order.sizes()[2],
          residual,
          mean};
}

Past check_scan_past(const char* op, const MarkovCall& c, const Tensor& y0, const OptTensor& pred) {
  Past past;
  past.y0 = check_real(op, "y0", y0, "factors", c.factors, {c.runs, c.lags, c.tests}, "[R, n, Q]");
  if (pred)
    past.y = check_real(op, "pred", *pred, "factors", c.factors, {c.runs, c.steps, c.tests},
                        "[R, T, Q]");
  return past;
}

Past check_recorded(const char* op, const MarkovCall& c, const Tensor& y, const OptTensor& y0,
                    const OptTensor& mask) {
  Past past;
  past.y = check_real(op, "y", y, "factors", c.factors, {c.runs, c.steps, c.tests}, "[R, T, Q]");
  if (y0)
    past.y0 =
        check_real(op, "y0", *y0, "factors", c.factors, {c.runs, c.lags, c.tests}, "[R, n, Q]");
  if (mask) {
    check_bytes(op, "mask", *mask);
    check_sizes(op, "mask", *mask, {c.runs, c.steps, c.tests}, "[R, T, Q]");
    check_same_device(op, "factors", c.factors, "mask", *mask);
    past.mask = with_contiguous_rows(*mask);
  }
  return past;
}

Tensor check_grad(const char* op, const MarkovCall& c, const Tensor& grad) {
  return check_real(op, "grad", grad, "factors", c.factors, {c.runs, c.steps, c.tests},
                    "[R, T, Q]");
}

Tensor new_states(const MarkovCall& c) {
  return new_output(c.factors, {c.runs, c.steps, c.tests}, real_of(c.factors));
}
Tensor new_history(const MarkovCall& c) {
  return new_output(c.factors, {c.runs, c.lags, c.tests}, real_of(c.factors));
}
Tensor nothing(const MarkovCall& c) {
  return new_output(c.factors, {0}, real_of(c.factors));
}
Tensor like_factors(const MarkovCall& c) {
  return new_output(c.factors, {c.lags + 1, c.rows, c.tests}, c.factors.scalar_type());
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "markov_scan(Tensor factors, Tensor order, Tensor y0, bool residual=False, *, "
      "Tensor? lengths=None, str reduction=\"sum\") -> Tensor pred");
  m.def(
      "markov_scan_backward(Tensor grad, Tensor factors, Tensor order, Tensor y0, Tensor pred, "
      "bool residual=False, *, Tensor? lengths=None, str reduction=\"sum\") "
      "-> (Tensor grad_factors, Tensor grad_y0)");
  m.def(
      "markov_onestep(Tensor factors, Tensor order, Tensor y, bool residual=False, "
      "Tensor? y0=None, *, Tensor? mask=None, Tensor? lengths=None, str reduction=\"sum\") "
      "-> Tensor pred");
  // of_past: gradients of y and y0 too; else, or without y0, they are empty.
  m.def(
      "markov_onestep_backward(Tensor grad, Tensor factors, Tensor order, Tensor y, "
      "bool residual=False, Tensor? y0=None, bool of_past=False, *, Tensor? mask=None, "
      "Tensor? lengths=None, str reduction=\"sum\") "
      "-> (Tensor grad_factors, Tensor grad_y, Tensor grad_y0)");
}
