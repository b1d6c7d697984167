// Schemas of PPO's losses.
#include <torch/csrc/stable/library.h>

// A backward computes its terms anew: they are cheaper than their storage. Its `grad` is 0-d.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "ma_ppo_policy_loss(Tensor logp_new, Tensor logp_old, Tensor adv, Tensor seg, "
      "float eps_lo=0.2, float eps_hi=0.2, str ratio=\"token\", str agg=\"token_mean\", "
      "float denom=0.0, *, str weight=\"macro\") -> (Tensor loss, Tensor stats)");
  m.def(
      "ma_ppo_policy_loss_backward(Tensor grad, Tensor logp_new, Tensor logp_old, Tensor adv, "
      "Tensor seg, float eps_lo, float eps_hi, str ratio, str agg, float denom, str weight) "
      "-> Tensor");
  m.def(
      "ma_ppo_value_loss(Tensor v_new, Tensor v_old, Tensor ret, Tensor mask, float clip=0.2, "
      "str agg=\"token_mean\", float denom=0.0) -> (Tensor loss, Tensor stats)");
  m.def(
      "ma_ppo_value_loss_backward(Tensor grad, Tensor v_new, Tensor v_old, Tensor ret, "
      "Tensor mask, float clip, str agg, float denom) -> Tensor");
}
