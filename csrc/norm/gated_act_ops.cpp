// Schemas and checks of swiglu and gated_gelu.
#include "norm/gated_act_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/dispatch.h"

namespace tenfold {
namespace {

void check_pair(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                const Tensor& b) {
  check_float_dtype(op, a_name, a);
  check_has_rows(op, a_name, a);
  check_same_dtype(op, a_name, a, b_name, b);
  check_like(op, a_name, a, b_name, b);
}

}  // namespace

Gate gelu_of(const char* op, const std::string& approximate) {
  if (approximate == "tanh") return Gate::gelu_tanh;
  TENFOLD_CHECK_VALUE(approximate == "none", "tenfold::", op,
                      ": approximate must be tanh or none, got '", approximate, "'");
  return Gate::gelu;
}

GatedCall check_gated(const char* op, const char* a_name, const char* b_name, Gate gate,
                      const Tensor* out, const Tensor& a, const Tensor& b) {
  check_pair(op, a_name, a, b_name, b);
  GatedCall c{gate, to_dtype(a.scalar_type()), row_shape(a), readable_rows(a), readable_rows(b), {},
              false};
  if (out == nullptr) {
    c.out = new_rows(a, a.scalar_type());
    return c;
  }
  check_same_dtype(op, a_name, a, "out", *out);
  check_like(op, a_name, a, "out", *out);
  c.out = writable_rows(op, "out", *out);
  check_apart(op, "out", c.out, a_name, c.a, c.shape);
  check_apart(op, "out", c.out, b_name, c.b, c.shape);
  c.in_place = c.out.data == c.a.data || c.out.data == c.b.data;
  return c;
}

GatedGradCall check_gated_backward(const Tensor& grad, const Tensor& a, const Tensor& b,
                                   const std::string& act, bool of_a, bool of_b) {
  constexpr auto kOp = "gated_act_backward";
  check_pair(kOp, "a", a, "b", b);
  check_same_dtype(kOp, "a", a, "grad", grad);
  check_like(kOp, "a", a, "grad", grad);
  TENFOLD_CHECK_VALUE(act == "silu" || act == "gelu_tanh" || act == "gelu", "tenfold::", kOp,
                      ": act must be silu, gelu_tanh or gelu, got '", act, "'");
  const auto made = [&](bool wanted) {
    return wanted ? new_output(a, a.sizes(), a.scalar_type()) : new_output(a, {0}, a.scalar_type());
  };
  return {act == "silu"        ? Gate::silu
          : act == "gelu_tanh" ? Gate::gelu_tanh
                               : Gate::gelu,
          to_dtype(a.scalar_type()),
          row_shape(a),
          readable_rows(grad),
          readable_rows(a),
          readable_rows(b),
          made(of_a),
          made(of_b)};
}

RowShape joined_rows(RowShape shape, std::initializer_list<int64_t> strides) {
  const bool joined = shape.rows <= 1 || std::all_of(strides.begin(), strides.end(),
                                                     [&](int64_t s) { return s == shape.cols; });
  return joined ? RowShape{1, shape.rows * shape.cols} : shape;
}

}  // namespace tenfold

// The forms that end in _ write into out, which may be either input.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_(Tensor(a!) out, Tensor gate, Tensor up) -> ()");
  m.def("gated_gelu(Tensor a, Tensor b, *, str approximate=\"tanh\") -> Tensor");
  m.def("gated_gelu_(Tensor(a!) out, Tensor a, Tensor b, *, str approximate=\"tanh\") -> ()");
  m.def(
      "gated_act_backward(Tensor grad, Tensor a, Tensor b, str act, bool of_a, bool of_b) "
      "-> (Tensor grad_a, Tensor grad_b)");
}
