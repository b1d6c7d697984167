// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of last_token_reward and pairwise_logsigmoid.
#include "loss/reward_ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace tenfold {
namespace {

PoolTokens to_pool(const char* op, const std::string& name) {
  if (name == "last") return PoolTokens::last;
  TENFOLD_CHECK_VALUE(name == "mean", "tenfold::", op, ": pool must be last or mean, got '", name,
                      "'");
  return PoolTokens::mean;
}

Tensor check_float_vector(const char* op, const char* arg, const Tensor& t, const char* of_name,
                          const Tensor& of, int64_t size) {
  TENFOLD_CHECK_TYPE(t.scalar_type() == ScalarType::Float, "tenfold::", op, ": ", arg,
                     " must be float32, got ", dtype_name(t.scalar_type()));
  check_sizes(op, arg, t, {size}, "[B]");
  check_same_device(op, of_name, of, arg, t);
  return as_contiguous(t);
}

RewardCall check_head(const char* op, const Tensor& mask, const Tensor& w_v, int64_t rows,
                      int64_t length, int64_t dim, const std::string& pool) {
  check_bytes(op, "mask", mask);
  check_sizes(op, "mask", mask, {rows, length}, "[N, S]");
  check_float_dtype(op, "w_v", w_v);
  const bool vector = w_v.dim() == 1;
  TENFOLD_CHECK_VALUE((vector || w_v.dim() == 2) && w_v.sizes()[w_v.dim() - 1] == dim,
                      "tenfold::", op, ": w_v must be [", dim, "] or [C, ", dim, "], got ",
                      shape_str(w_v));
  const Tensor some = with_contiguous_rows(mask);
  return {some,
          as_contiguous(w_v),
          rows,
          length,
          dim,
          vector ? 1 : w_v.sizes()[0],
          some.numel() > 0 ? some.strides()[0] : 0,
          vector,
          to_pool(op, pool)};
}

void check_tokens(const char* op, const RewardCall& c) {
  const auto* const mask = static_cast<const uint8_t*>(c.mask.data_ptr());
  for (int64_t i = 0; i < c.rows; ++i) {
    bool found = false;
    for (int64_t t = c.length; t-- > 0 && !found;) found = mask[i * c.mask_stride + t] != 0;
    TENFOLD_CHECK_VALUE(found, "tenfold::", op, ": mask[", i,
                        "] has no real token; a reward needs "
                        "one in every row");
  }
}

}  // namespace

RewardForward check_reward(const char* op, const Tensor& hidden, const Tensor& mask,
                           const Tensor& w_v, const std::string& pool) {
  check_float_dtype(op, "hidden", hidden);
  check_dim(op, "hidden", hidden, 3, "[N, S, H]");
  const auto sizes = hidden.sizes();
  check_same_device(op, "hidden", hidden, "mask", mask);
  check_same_device(op, "hidden", hidden, "w_v", w_v);
  RewardForward c{check_head(op, mask, w_v, sizes[0], sizes[1], sizes[2], pool),
                  with_contiguous_rows(hidden), 0, 0};
  TENFOLD_CHECK_VALUE(c.dim > 0, "tenfold::", op, ": hidden must have H > 0, got ",
                      shape_str(hidden));
  if (c.hidden.numel() > 0)
    c.row_stride = c.hidden.strides()[0], c.token_stride = c.hidden.strides()[1];
  if (mask.is_cpu()) check_tokens(op, c);
  return c;
}

RewardBackward check_reward_backward(const char* op, const Tensor& grad, const Tensor& pooled,
                                     const Tensor& mask, const Tensor& w_v, const Tensor& like,
                                     const std::string& pool) {
  check_dim(op, "pooled", pooled, 2, "[N, H]");
  check_dim(op, "mask", mask, 2, "[N, S]");
  check_float_dtype(op, "like", like);
  const Tensor* const floats[] = {&grad, &pooled};
  for (const Tensor* t : floats)
    TENFOLD_CHECK_TYPE(t->scalar_type() == ScalarType::Float, "tenfold::", op,
                       ": grad and pooled must be float32, got ", dtype_name(t->scalar_type()));
  const int64_t rows = pooled.sizes()[0], dim = pooled.sizes()[1];
  RewardBackward c{check_head(op, mask, w_v, rows, mask.sizes()[1], dim, pool), as_contiguous(grad),
                   as_contiguous(pooled)};
  if (c.vector) {
    check_sizes(op, "grad", grad, {rows}, "[N]");
  } else {
    check_sizes(op, "grad", grad, {rows, c.classes}, "[N, C]");
  }
  const Tensor* const others[] = {&grad, &mask, &w_v, &like};
  const char* const names[] = {"grad", "mask", "w_v", "like"};
  for (int i = 0; i < 4; ++i) check_same_device(op, "pooled", pooled, names[i], *others[i]);
  return c;
}

PairCall check_pairs(const char* op, const Tensor& r_pos, const Tensor& r_neg,
                     const OptTensor& margin, double center) {
  check_float_dtype(op, "r_pos", r_pos);
  check_dim(op, "r_pos", r_pos, 1, "[B]");
  check_same_dtype(op, "r_pos", r_pos, "r_neg", r_neg);
  const int64_t pairs = r_pos.sizes()[0];
  TENFOLD_CHECK_VALUE(r_neg.dim() == 1 && r_neg.sizes()[0] == pairs, "tenfold::", op,
                      ": r_neg must be [", pairs, "], one per preferred row, got ",
                      shape_str(r_neg), "; an odd number of rows is no number of pairs");
  TENFOLD_CHECK_VALUE(pairs > 0, "tenfold::", op, ": r_pos must have at least one pair, got ",
                      shape_str(r_pos));
  if (r_neg.device() != r_pos.device()) check_same_device(op, "r_pos", r_pos, "r_neg", r_neg);
  TENFOLD_CHECK_VALUE(center >= 0.0 && std::isfinite(center), "tenfold::", op,
                      ": center must be finite, and 0 or above, got ", center);
  return {as_contiguous(r_pos), as_contiguous(r_neg),
          margin ? OptTensor(check_float_vector(op, "margin", *margin, "r_pos", r_pos, pairs))
                 : OptTensor(),
          pairs, static_cast<float>(center)};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "last_token_reward(Tensor hidden, Tensor mask, Tensor w_v, str pool='last') -> Tensor "
      "reward");
  // With pooled [N, H] float32, which its backward needs instead of hidden.
  m.def(
      "last_token_reward_forward(Tensor hidden, Tensor mask, Tensor w_v, str pool='last') "
      "-> (Tensor reward, Tensor pooled)");
  // like: of hidden's dtype and device, of any size. What is not wanted is empty.
  m.def(
      "last_token_reward_backward(Tensor grad, Tensor pooled, Tensor mask, Tensor w_v, Tensor "
      "like, "
      "bool of_hidden, bool of_weight, str pool='last') -> (Tensor grad_hidden, Tensor "
      "grad_weight)");
  m.def(
      "pairwise_logsigmoid(Tensor r_pos, Tensor r_neg, Tensor? margin=None, float center=0.0) "
      "-> (Tensor loss, Tensor delta)");
  // With the gradients of the loss, float32.
  m.def(
      "pairwise_logsigmoid_grads(Tensor r_pos, Tensor r_neg, Tensor? margin=None, "
      "float center=0.0) -> (Tensor loss, Tensor delta, Tensor grad_pos, Tensor grad_neg)");
}
