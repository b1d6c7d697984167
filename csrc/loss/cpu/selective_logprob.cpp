// SPDX-License-Identifier: Apache-2.0
// CPU registration of selective_logprob and its backward.
#include "loss/selective_logprob.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "loss/cpu/logprob_rows.h"
#include "loss/logprob_ops.h"

namespace tenfold::cpu {
namespace {

using OptTensor = std::optional<Tensor>;

LogitRows rows_of(const LogprobCall& c) {
  return {static_cast<const char*>(c.logits.data_ptr()),
          to_dtype(c.logits.scalar_type()),
          c.vocab,
          std::max<int64_t>(1, c.rows),
          0,
          c.row_stride};
}

std::tuple<Tensor, Tensor, Tensor> selective_logprob_op(Tensor logits, Tensor ids,
                                                        double temperature) {
  constexpr auto kOp = "selective_logprob";
  const LogprobCall c = check_logprob(kOp, logits, ids, temperature);
  const LogitRows x = rows_of(c);
  const auto scale = static_cast<float>(1.0 / temperature);
  const Tensor logp = new_output(c.logits, {c.rows}, ScalarType::Float);
  const Tensor lse = new_output(c.logits, {c.rows}, ScalarType::Float);
  const Tensor entropy = new_output(c.logits, {c.rows}, ScalarType::Float);
  const auto norms = norms_of(x, c.rows, scale, [](int64_t r) { return r; });
  for (int64_t r = 0; r < c.rows; ++r) {
    const LogitNorm& norm = norms[r];
    data_as<float>(lse)[r] = static_cast<float>(norm.max + norm.log_sum);
    data_as<float>(entropy)[r] = static_cast<float>(norm.entropy);
    // A masked position has an id outside [0, V): its log-probability is 0 and has no gradient.
    const int64_t id = id_at(c.ids, r);
    data_as<float>(logp)[r] =
        x.has(id) ? static_cast<float>(norm.logp(x.value(r, id) * scale)) : 0.0f;
  }
  return {logp, lse, entropy};
}

float grad_at(const OptTensor& grad, int64_t row) {
  return grad ? data_as<float>(*grad)[row] : 0.0f;
}

Tensor selective_logprob_backward_op(OptTensor grad_logp, OptTensor grad_lse,
                                     OptTensor grad_entropy, Tensor logits, Tensor ids, Tensor lse,
                                     Tensor entropy, double temperature) {
  constexpr auto kOp = "selective_logprob_backward";
  const LogprobCall c = check_logprob(kOp, logits, ids, temperature);
  OptTensor all[] = {grad_logp, grad_lse, grad_entropy, lse, entropy};
  const char* const names[] = {"grad_logp", "grad_lse", "grad_entropy", "lse", "entropy"};
  for (int i = 0; i < 5; ++i) {
    if (!all[i]) continue;
    TENFOLD_CHECK_TYPE(all[i]->scalar_type() == ScalarType::Float, "tenfold::", kOp, ": ", names[i],
                       " must be float32, got ", dtype_name(all[i]->scalar_type()));
    TENFOLD_CHECK_VALUE(all[i]->dim() == 1 && all[i]->sizes()[0] == c.rows, "tenfold::", kOp, ": ",
                        names[i], " must be [", c.rows, "], got ", shape_str(*all[i]));
    if (!all[i]->is_contiguous()) all[i] = torch::stable::contiguous(*all[i]);
  }
  const LogitRows x = rows_of(c);
  const auto scale = static_cast<float>(1.0 / temperature);
  const Tensor out = new_output(c.logits, {c.rows, c.vocab}, logits.scalar_type());
  grads_of(x, c.rows, scale, out.data_ptr(), [&](int64_t r) {
    const int64_t id = id_at(c.ids, r);
    const float top = x.has(id) ? grad_at(all[0], r) : 0.0f;
    const LogitGrad g{data_as<float>(*all[3])[r],
                      data_as<float>(*all[4])[r],
                      grad_at(all[1], r) - top,
                      grad_at(all[2], r),
                      top,
                      scale};
    return RowGrad{true, g, id};
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("selective_logprob", TORCH_BOX(&tenfold::cpu::selective_logprob_op));
  m.impl("selective_logprob_backward", TORCH_BOX(&tenfold::cpu::selective_logprob_backward_op));
}
