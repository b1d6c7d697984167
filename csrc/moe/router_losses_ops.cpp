// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of load_balance_loss and router_seed_loss.
#include "moe/router_losses_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {
namespace {

// [tokens], one per token of `like`.
void check_tokens(const char* op, const char* arg, const Tensor& t, int64_t tokens,
                  const char* like_name, const Tensor& like) {
  check_fits(op, arg, t, {tokens}, "[T]", like_name, like);
  check_place(op, arg, t, like_name, like);
}

OptTensor check_mask(const char* op, const OptTensor& mask, int64_t tokens, const char* like_name,
                     const Tensor& like) {
  if (!mask) return mask;
  check_bytes(op, "token_mask", *mask);
  check_tokens(op, "token_mask", *mask, tokens, like_name, like);
  return as_contiguous(*mask);
}

}  // namespace

BalanceCall check_balance(const char* op, const Tensor& logits, const Tensor& counts,
                          const OptTensor& token_mask, int64_t k, const std::string& norm) {
  check_float_dtype(op, "logits", logits);
  check_dim(op, "logits", logits, 2, "[T, n]");
  const int64_t tokens = logits.sizes()[0], experts = logits.sizes()[1];
  check_k(op, k, experts);
  TENFOLD_CHECK_VALUE(norm == "slots" || norm == "tokens", "tenfold::", op,
                      ": norm must be slots or tokens, got '", norm, "'");
  check_int_dtype(op, "counts", counts);
  check_fits(op, "counts", counts, {experts}, "[n]", "logits", logits);
  check_place(op, "counts", counts, "logits", logits);
  return {with_contiguous_rows(logits),
          as_contiguous(counts),
          check_mask(op, token_mask, tokens, "logits", logits),
          tokens,
          experts,
          k,
          norm == "slots"};
}

SeedCall check_seed(const char* op, const Tensor& h_in, const Tensor& r,
                    const OptTensor& token_mask, const OptTensor& target) {
  check_float_dtype(op, "h", h_in);
  const auto s = r.scalar_type();
  TENFOLD_CHECK_TYPE(s == h_in.scalar_type() || s == ScalarType::Float, "tenfold::", op,
                     ": r must be float32 or have the dtype of h (", dtype_name(h_in.scalar_type()),
                     "), got ", dtype_name(s));
  TENFOLD_CHECK_VALUE(r.dim() == 1 || r.dim() == 2, "tenfold::", op,
                      ": r must be [d] or [L, d], got ", shape_str(r));
  const bool layered = r.dim() == 2;
  TENFOLD_CHECK_VALUE(h_in.dim() == r.dim() + 1, "tenfold::", op, ": h must be ",
                      layered ? "[L, T, d] with r [L, d]" : "[T, d] with r [d]", ", got h ",
                      shape_str(h_in), " and r ", shape_str(r));
  const int64_t layers = layered ? h_in.sizes()[0] : 1, last = h_in.dim() - 1;
  const int64_t tokens = h_in.sizes()[last - 1], dim = h_in.sizes()[last];
  TENFOLD_CHECK_VALUE(r.sizes()[r.dim() - 1] == dim && (!layered || r.sizes()[0] == layers),
                      "tenfold::", op, ": r must have the layers and the hidden size of h ",
                      shape_str(h_in), ", got ", shape_str(r));
  TENFOLD_CHECK_VALUE(tokens < INT32_MAX, "tenfold::", op, ": h must have fewer than 2^31 - 1 ",
                      "tokens, got ", tokens);
  check_place(op, "r", r, "h", h_in);
  const OptTensor mask = check_mask(op, token_mask, tokens, "h", h_in);
  if (target) {
    check_float32(op, "target", *target);
    check_tokens(op, "target", *target, tokens, "h", h_in);
  }
  const Tensor h = with_contiguous_rows(h_in);
  const bool some = h.numel() > 0;
  return {h,
          as_contiguous(r),
          mask,
          target ? OptTensor(as_contiguous(*target)) : OptTensor(),
          layers,
          tokens,
          dim,
          some && layered ? h.strides()[0] : 0,
          some ? h.strides()[last - 1] : 0};
}

void check_loss_grad(const char* op, const Tensor& grad, const char* like_name,
                     const Tensor& like) {
  check_float32(op, "grad", grad);
  check_fits(op, "grad", grad, {}, "0-d", like_name, like);
  check_place(op, "grad", grad, like_name, like);
}

Tensor new_slope(const SeedCall& c) {
  if (c.r.dim() == 1) return new_output(c.h, {c.tokens}, ScalarType::Float);
  return new_output(c.h, {c.layers, c.tokens}, ScalarType::Float);
}

Tensor new_seed_grad(const SeedCall& c, bool wanted) {
  const auto dtype = c.r.scalar_type();
  if (!wanted) return new_output(c.h, {0}, dtype);
  if (c.r.dim() == 1) return new_output(c.h, {c.dim}, dtype);
  return new_output(c.h, {c.layers, c.dim}, dtype);
}

SeedGradCall check_seed_grad(const char* op, const Tensor& grad, const Tensor& slope,
                             const Tensor& h, const Tensor& r) {
  const SeedCall c = check_seed(op, h, r, std::nullopt, std::nullopt);
  check_loss_grad(op, grad, "h", h);
  check_float32(op, "slope", slope);
  TENFOLD_CHECK_VALUE(slope.numel() == c.layers * c.tokens, "tenfold::", op,
                      ": slope must have one number per row of h ", shape_str(h), ", got ",
                      shape_str(slope));
  check_place(op, "slope", slope, "h", h);
  const Tensor out = c.r.dim() == 1 ? new_output(c.h, {c.tokens, c.dim}, h.scalar_type())
                                    : new_output(c.h, {c.layers, c.tokens, c.dim}, h.scalar_type());
  return {c, as_contiguous(slope), out};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "load_balance_loss(Tensor logits, Tensor counts, Tensor? token_mask, int k, "
      "str norm='slots') -> Tensor");
  m.def(
      "load_balance_loss_backward(Tensor grad, Tensor logits, Tensor counts, Tensor? token_mask, "
      "int k, str norm) -> Tensor");
  m.def(
      "router_seed_loss(Tensor h, Tensor r, Tensor? token_mask=None, Tensor? target=None) "
      "-> Tensor");
  // With what its backward needs: slope, float32 [L, T] or [T], and the gradient of r, which is
  // empty unless it is wanted.
  m.def(
      "router_seed_loss_grads(Tensor h, Tensor r, Tensor? token_mask, Tensor? target, bool of_r) "
      "-> (Tensor loss, Tensor slope, Tensor grad_r)");
  m.def("router_seed_loss_backward(Tensor grad, Tensor slope, Tensor h, Tensor r) -> Tensor");
}
