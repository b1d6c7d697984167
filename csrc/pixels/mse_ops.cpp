// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of patch_mse and its gradient.
#include "pixels/mse_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/overlap.h"

namespace tenfold {
namespace {

void check_shape(const char* op, const char* arg, const Tensor& t, const char* layout,
                 const std::vector<int64_t>& want) {
  const auto got = t.sizes();
  TENFOLD_CHECK_VALUE(std::equal(got.begin(), got.end(), want.begin(), want.end()), "tenfold::", op,
                      ": ", arg, " must have shape ", layout, " = ", sizes_str(want), ", got ",
                      shape_str(t));
}

// float32, bfloat16, float16; float64 on a CPU, beside an image that double precision loses nothing
// of without a kernel of its own.
void check_pred_dtype(const char* op, const char* arg, const Tensor& pred, const Tensor& image) {
  const ScalarType s = pred.scalar_type(), of = image.scalar_type();
  if (s != ScalarType::Double) return check_float_dtype(op, arg, pred);
  TENFOLD_CHECK_TYPE(pred.is_cpu() && (of == ScalarType::Byte || of == ScalarType::Float),
                     "tenfold::", op, ": ", arg,
                     " may be float64 on a CPU only, with an image of uint8 or float32; got ",
                     device_str(pred), " and ", dtype_name(of));
}

WeightKind weight_kind(const char* op, const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte: return WeightKind::u8;
    case ScalarType::Int: return WeightKind::i32;
    case ScalarType::Long: return WeightKind::i64;
    case ScalarType::Float: return WeightKind::f32;
    case ScalarType::Double: return WeightKind::f64;
    default:
      raise(ErrorKind::type, "tenfold::", op,
            ": mask must be bool, uint8, int32, int64, float32 or float64, got ",
            dtype_name(mask.scalar_type()));
  }
}

// Only what fits vectors of neighbours.
Tensor with_rows(const Tensor& t, int64_t lead) {
  const bool fits = one_step(t, lead) &&
                    (t.numel() == 0 || t.sizes()[lead + 1] == 1 || t.strides()[lead + 1] == 1);
  return fits ? t : torch::stable::contiguous(t);
}

PatchRows rows_of(const Tensor& t, int64_t lead) {
  return {t.data_ptr(), *one_step(t, lead), t.strides()[lead]};
}

OptTensor check_denom(const char* op, const OptTensor& denom, const Tensor& pred, ScalarType real) {
  if (!denom) return std::nullopt;
  TENFOLD_CHECK_TYPE(denom->scalar_type() == real, "tenfold::", op, ": denom must be ",
                     dtype_name(real), ", got ", dtype_name(denom->scalar_type()));
  TENFOLD_CHECK_VALUE(denom->numel() == 1, "tenfold::", op,
                      ": denom must be one number, got shape ", shape_str(*denom));
  check_same_device(op, "pred", pred, "denom", *denom);
  if (denom->is_cpu()) {
    const double x =
        real == ScalarType::Double ? *data_as<double>(*denom) : *data_as<float>(*denom);
    TENFOLD_CHECK_VALUE(x >= 0.0, "tenfold::", op, ": denom must be at least 0, got ", x);
  }
  return denom;
}

// All but outputs.
MseCall check_inputs(const char* op, const Tensor& pred_in, const Tensor& image_in,
                     const Tensor& mask_in, const MseRule& rule) {
  check_eps(op, rule.eps);
  TENFOLD_CHECK_VALUE(rule.shift >= 0, "tenfold::", op, ": shift must be at least 0, got ",
                      rule.shift);
  check_pred_dtype(op, "pred", pred_in, image_in);
  const WeightKind kind = weight_kind(op, mask_in);
  check_same_device(op, "pred", pred_in, "image", image_in);
  check_same_device(op, "pred", pred_in, "mask", mask_in);
  Image image = check_image(op, image_in, rule.patch, "rcc", rule.channels, rule.validate);
  const auto lead = static_cast<int64_t>(image.batch.size());
  const int64_t length = image.grid.length();
  check_shape(op, "pred", pred_in, "[..., L, P]", image.sizes({length, image.grid.values()}));
  check_shape(op, "mask", mask_in, "[..., L]", image.sizes({length}));
  const Tensor pred = with_rows(pred_in, lead), mask = as_contiguous(mask_in);
  PatchMse mse{};
  mse.grid = image.grid;
  mse.pred = rows_of(pred, lead);
  mse.weights = {mask.data_ptr(), kind};
  mse.normalize = rule.norm_pix, mse.eps = rule.eps;
  mse.shift = std::min(rule.shift, length);
  const ScalarType real =
      pred.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  MseCall c{};
  c.op = op, c.image = image, c.pred = pred, c.mask = mask, c.mse = mse, c.real = real;
  return c;
}

}  // namespace

MseCall check_patch_mse(const char* op, WithGrad with, const Tensor& pred, const Tensor& image,
                        const Tensor& mask, const MseRule& rule, const OptTensor& denom) {
  MseCall c = check_inputs(op, pred, image, mask, rule);
  c.given_denom = check_denom(op, denom, c.pred, c.real);
  const auto lead = static_cast<int64_t>(c.image.batch.size());
  if (with == WithGrad::over_pred) {
    check_no_overlap(op, "pred", pred);
    TENFOLD_CHECK_VALUE(pred.numel() == 0 || c.pred.data_ptr() == pred.data_ptr(), "tenfold::", op,
                        ": pred is written, so its last dim must be contiguous and its batch dims "
                        "of one stride");
    c.grad = c.pred;
  }
  if (with == WithGrad::fresh)
    c.grad = new_output_of(c.pred, c.image.sizes({c.mse.grid.length(), c.mse.grid.values()}),
                           c.pred.scalar_type());
  if (c.grad) c.mse.grad = rows_of(*c.grad, lead);
  c.loss = new_output(c.pred, {}, c.real);
  c.per_patch = new_output_of(c.pred, c.image.sizes({c.mse.grid.length()}), c.real);
  c.denom = new_output(c.pred, {}, c.real);
  if (c.real == ScalarType::Float) c.mse.per_patch = data_as<float>(*c.per_patch);
  return c;
}

MseCall check_patch_mse_backward(const char* op, const OptTensor& given_grad, bool made,
                                 const Tensor& grad_loss, const Tensor& pred, const Tensor& image,
                                 const Tensor& mask, const Tensor& denom, const MseRule& rule) {
  MseCall c = check_inputs(op, pred, image, mask, rule);
  c.given_denom = check_denom(op, denom, c.pred, c.real);
  TENFOLD_CHECK_TYPE(grad_loss.scalar_type() == c.real, "tenfold::", op, ": grad_loss must be ",
                     dtype_name(c.real), ", got ", dtype_name(grad_loss.scalar_type()));
  TENFOLD_CHECK_VALUE(grad_loss.numel() == 1, "tenfold::", op,
                      ": grad_loss must be one number, got shape ", shape_str(grad_loss));
  check_same_device(op, "pred", c.pred, "grad_loss", grad_loss);
  c.grad_loss = grad_loss, c.made = made;
  const auto lead = static_cast<int64_t>(c.image.batch.size());
  const std::vector<int64_t> sizes = c.image.sizes({c.mse.grid.length(), c.mse.grid.values()});
  if (given_grad) {
    check_same_dtype(op, "pred", c.pred, "grad", *given_grad);
    check_shape(op, "grad", *given_grad, "[..., L, P]", sizes);
    check_same_device(op, "pred", c.pred, "grad", *given_grad);
    TENFOLD_CHECK_VALUE(given_grad->is_contiguous(), "tenfold::", op, ": grad must be contiguous");
    // Over pred itself each value is read before it is written.
    const bool over = given_grad->data_ptr() == pred.data_ptr() && pred.is_contiguous();
    Memory memory(4);
    memory.writes("grad", 0, *given_grad);
    if (!over && is_dense(pred)) memory.reads("pred", 0, pred);
    if (is_dense(image)) memory.reads("image", 0, image);
    if (is_dense(mask)) memory.reads("mask", 0, mask);
    memory.check(op);
  }
  c.grad = given_grad ? *given_grad : new_output_of(c.pred, sizes, c.pred.scalar_type());
  c.mse.grad = rows_of(*c.grad, lead);
  return c;
}

}  // namespace tenfold

// _forward gives the gradient for grad_loss = 1 too, in the same pass; patch_mse_ writes it over
// pred. backward_ writes into grad (contiguous; it may be pred); with made, grad holds the one for
// grad_loss = 1, and nothing is done where that is what was asked for.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "patch_mse(Tensor pred, Tensor image, Tensor mask, int patch, bool norm_pix, float eps, "
      "int shift, Tensor? denom, *, str channels=\"auto\", bool validate=True) "
      "-> (Tensor loss, Tensor per_patch, Tensor denom)");
  m.def(
      "patch_mse_forward(Tensor pred, Tensor image, Tensor mask, int patch, bool norm_pix, "
      "float eps, int shift, Tensor? denom, *, str channels=\"auto\", bool validate=True) "
      "-> (Tensor loss, Tensor per_patch, Tensor denom, Tensor grad)");
  m.def(
      "patch_mse_(Tensor(a!) pred, Tensor image, Tensor mask, int patch, bool norm_pix, float eps, "
      "int shift, Tensor? denom, *, str channels=\"auto\", bool validate=True) "
      "-> (Tensor loss, Tensor per_patch, Tensor denom)");
  m.def(
      "patch_mse_backward(Tensor grad_loss, Tensor pred, Tensor image, Tensor mask, Tensor denom, "
      "int patch, bool norm_pix, float eps, int shift, *, str channels=\"auto\") -> Tensor");
  m.def(
      "patch_mse_backward_(Tensor(a!) grad, Tensor grad_loss, Tensor pred, Tensor image, "
      "Tensor mask, Tensor denom, int patch, bool norm_pix, float eps, int shift, *, "
      "str channels=\"auto\", bool made=False) -> ()");
}
