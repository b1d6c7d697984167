// What the CPU and CUDA registrations of linear_cross_entropy and linear_logprob share: argument
// checks, and the numbers of a row. Values of targets are checked on the CPU only.
#pragma once

#include <optional>
#include <string>

#include "core/check.h"
#include "core/macros.h"
#include "core/tensor.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

enum class LossReduction : int { none, mean, sum };

struct LinearLossCall {
  Tensor hidden, weight, target;  // [N, H], [V, H] with contiguous rows; [N], contiguous
  OptTensor row_weight;           // float32 [N], contiguous
  int64_t rows, dim, vocab, hidden_stride, weight_stride;
  int64_t ignore_index;
  LossReduction reduction;
  float softcap, z_loss, temperature;
};

LinearLossCall check_linear_loss(const char* op, const Tensor& hidden, const Tensor& weight,
                                 const Tensor& target, const OptTensor& row_weight,
                                 int64_t ignore_index, const std::string& reduction, double softcap,
                                 double z_loss, double temperature);

LinearLossCall check_linear_logprob(const char* op, const Tensor& hidden, const Tensor& weight,
                                    const Tensor& ids, double temperature);

// float32 [N], or 0-d where `scalar`; contiguous.
OptTensor check_row_floats(const char* op, const char* arg, const OptTensor& t, int64_t rows,
                           bool scalar = false);

// What the gradient of a row's logits is made of: d = p (of_p + of_entropy (base - x)) + of_id.
struct RowSlopes {
  float of_p, of_id, of_entropy, base;
};

// Of grad_loss w (lse - x[target] + z_loss lse^2) + grad_lse lse, where g is grad_loss w.
TENFOLD_HD RowSlopes loss_slopes(float g, float grad_lse, float lse, float z_loss) {
  return {g * (1.0f + 2.0f * z_loss * lse) + grad_lse, -g, 0.0f, 0.0f};
}

// Of grad_logp (x[id] - lse) + grad_entropy (lse - sum p x) + grad_lse lse.
TENFOLD_HD RowSlopes logprob_slopes(float grad_logp, float grad_entropy, float grad_lse, float lse,
                                    float entropy) {
  return {grad_lse - grad_logp, grad_logp, grad_entropy, lse - entropy};
}

}  // namespace tenfold
