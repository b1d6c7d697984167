// SPDX-License-Identifier: Apache-2.0
// linear_cross_entropy (MA-RLHF section 7, PixelGPT K3): of rows of logits that are never stored,
//
//   y[i, v] = hidden[i] . weight[v], with a soft cap c: c tanh(y / c)    [N, V]
//   x[i, v] = y[i, v] / temperature
//   lse[i]  = log sum exp x[i]
//   loss[i] = w[i] (lse[i] - x[i, target[i]] + z_loss lse[i]^2)
//
// and the gradients of hidden [N, H] and weight [V, H]. Rows whose target is ignore_index or whose
// w is 0 do not count: they are never read. Of every logit's gradient
//
//   d loss / d x[i, v] = p (of_p - of_entropy (entropy + log p)) + of_id where v is the target
//
// with log p = x - lse (entropy and log p may be small where lse is large); linear_logprob differs
// in these numbers of a row only. 2 N H V FLOPs for each of: logits, gradient of hidden, gradient
// of weight.
//
// Backward multiplies the logits again: 8 N H V with the forward pass, and no memory but the
// gradients and tiles. Where the upstream gradient is one number (mean, sum), a backend may make
// the gradients with the loss, in 6 N H V: linear_cross_entropy_grads.
#pragma once

#include "core/macros.h"

namespace tenfold {

struct RowSlopes {
  float of_p, of_id, of_entropy, entropy;
};

// Of grad_loss w (lse - x[target] + z_loss lse^2) + grad_lse lse, where g is grad_loss w.
TENFOLD_HD RowSlopes loss_slopes(float g, float grad_lse, float lse, float z_loss) {
  return {g * (1.0f + 2.0f * z_loss * lse) + grad_lse, -g, 0.0f, 0.0f};
}

// Of grad_logp (x[id] - lse) + grad_entropy (lse - sum p x) + grad_lse lse.
TENFOLD_HD RowSlopes logprob_slopes(float grad_logp, float grad_entropy, float grad_lse,
                                    float entropy) {
  return {grad_lse - grad_logp, grad_logp, grad_entropy, entropy};
}

}  // namespace tenfold
