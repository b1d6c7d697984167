// The numbers of a row of which linear_cross_entropy and linear_logprob make the gradients of its
// logits.
#pragma once

#include "core/macros.h"

namespace tenfold {

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
