// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of swiglu and gated_gelu.
#include "norm/gated_act_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/dispatch.h"

namespace tenfold {
namespace {

// The dtype of both.
ScalarType check_pair(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                      const Tensor& b) {
  const ScalarType dtype = a.scalar_type();
  check_float_dtype(op, a_name, a);
  check_has_rows(op, a_name, a);
  check_same_dtype(op, a_name, a, b_name, b);
  check_like(op, a_name, a, b_name, b);
  return dtype;
}

}  // namespace

Gate gelu_of(const char* op, const std::string& approximate) {
  if (approximate == "tanh") return Gate::gelu_tanh;
  TENFOLD_CHECK_VALUE(approximate == "none", "tenfold::", op,
                      ": approximate must be tanh or none, got '", approximate, "'");
  return Gate::gelu;
}

Gate gate_of(const char* op, int64_t act) {
  TENFOLD_CHECK_VALUE(act >= 0 && act <= 2, "tenfold::", op,
                      ": act must be 0 (silu), 1 (gelu_tanh) or 2 (gelu), got ", act);
  return static_cast<Gate>(act);
}

GatedCall check_gated(const char* op, const char* a_name, const char* b_name, Gate gate,
                      const Tensor* out, const Tensor& a, const Tensor& b) {
  const ScalarType dtype = check_pair(op, a_name, a, b_name, b);
  if (out != nullptr) {
    check_same_dtype(op, a_name, a, "out", *out);
    check_like(op, a_name, a, "out", *out);
  }
  const RowShape shape = row_shape(a);
  GatedCall c{gate,
              to_dtype(dtype),
              shape,
              readable_rows(a, shape),
              readable_rows(b, shape),
              out != nullptr ? writable_rows(op, "out", *out, shape) : new_rows(a, dtype, shape),
              false,
              out == nullptr};
  if (out == nullptr) return c;
  check_apart(op, "out", c.out, a_name, c.a, c.shape);
  check_apart(op, "out", c.out, b_name, c.b, c.shape);
  c.in_place = c.out.data == c.a.data || c.out.data == c.b.data;
  return c;
}

GatedGradCall check_gated_backward(const Tensor& grad, const Tensor& a, const Tensor& b,
                                   int64_t act, bool of_a, bool of_b) {
  constexpr auto kOp = "gated_act_backward";
  const ScalarType dtype = check_pair(kOp, "a", a, "b", b);
  check_same_dtype(kOp, "a", a, "grad", grad);
  check_like(kOp, "a", a, "grad", grad);
  const Gate gate = gate_of(kOp, act);
  const RowShape shape = row_shape(a);
  const auto made = [&](bool wanted) {
    return wanted ? new_output(a, a.sizes(), dtype) : new_output(a, {0}, dtype);
  };
  return {gate,
          to_dtype(dtype),
          shape,
          readable_rows(grad, shape),
          readable_rows(a, shape),
          readable_rows(b, shape),
          made(of_a),
          made(of_b)};
}

RowShape joined_rows(RowShape shape, std::initializer_list<int64_t> strides) {
  const bool joined = shape.rows <= 1 || std::all_of(strides.begin(), strides.end(),
                                                     [&](int64_t s) { return s == shape.cols; });
  return joined ? RowShape{1, shape.rows * shape.cols} : shape;
}

}  // namespace tenfold

// gated_act(_) is what the faces of both call where no gradient is wanted: without an Autograd
// kernel the dispatcher does not enter Python, and a string would take half a microsecond. The
// forms that end in _ write into out, which may be either input.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("gated_act(Tensor a, Tensor b, int act) -> Tensor");
  m.def("gated_act_(Tensor(a!) out, Tensor a, Tensor b, int act) -> ()");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_(Tensor(a!) out, Tensor gate, Tensor up) -> ()");
  m.def("gated_gelu(Tensor a, Tensor b, *, str approximate=\"tanh\") -> Tensor");
  m.def("gated_gelu_(Tensor(a!) out, Tensor a, Tensor b, *, str approximate=\"tanh\") -> ()");
  m.def(
      "gated_act_backward(Tensor grad, Tensor a, Tensor b, int act, bool of_a, bool of_b) "
      "-> (Tensor grad_a, Tensor grad_b)");
}
