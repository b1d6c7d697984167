// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of PPO's losses.
#include "rl/losses_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {
namespace {

MeanRule to_mean(const char* op, const std::string& agg, double denom) {
  TENFOLD_CHECK_VALUE(agg == "token_mean" || agg == "seq_mean_token_mean", "tenfold::", op,
                      ": agg must be token_mean or seq_mean_token_mean, got '", agg, "'");
  TENFOLD_CHECK_VALUE(denom >= 0.0, "tenfold::", op, ": denom must be at least 0, got ", denom);
  return {agg == "token_mean" ? AggregateBy::token_mean : AggregateBy::seq_mean_token_mean, denom};
}

LossOut make_out(const MeanRule& mean, const Tensor& like, const Layout& layout, int stats,
                 bool with_slope) {
  LossOut out{mean, new_output(like, {}, like.scalar_type()),
              new_output(like, {stats}, ScalarType::Float), std::nullopt, std::nullopt};
  if (!with_slope) return out;
  out.slope = new_tokens(like, layout, like.scalar_type());
  out.scale = new_output(like, {layout.rows.count}, ScalarType::Double);
  return out;
}

}  // namespace

PolicyCall check_policy(bool with_slope, const Tensor& logp_new, const Tensor& logp_old,
                        const Tensor& adv_in, const Tensor& seg_in, double eps_lo, double eps_hi,
                        const std::string& ratio, const std::string& agg, double denom,
                        const std::string& weight, const OptTensor& cu_seqlens, bool validate) {
  constexpr auto kOp = "ma_ppo_policy_loss";
  TENFOLD_CHECK_VALUE(eps_lo >= 0.0 && eps_lo < 1.0, "tenfold::", kOp,
                      ": eps_lo must be in [0, 1), got ", eps_lo);
  TENFOLD_CHECK_VALUE(eps_hi >= 0.0, "tenfold::", kOp, ": eps_hi must be at least 0, got ", eps_hi);
  TENFOLD_CHECK_VALUE(ratio == "token" || ratio == "joint" || ratio == "geo_mean", "tenfold::", kOp,
                      ": ratio must be token, joint or geo_mean, got '", ratio, "'");
  TENFOLD_CHECK_VALUE(weight == "macro" || weight == "length", "tenfold::", kOp,
                      ": weight must be macro or length, got '", weight, "'");
  const MeanRule mean = to_mean(kOp, agg, denom);
  const Segments seg = check_seg(kOp, seg_in, cu_seqlens);
  const Tensor now = check_rows(kOp, "logp_new", logp_new, seg.seg);
  const Tensor old = check_rows(kOp, "logp_old", logp_old, seg.seg);
  const Tensor adv = check_rows(kOp, "adv", adv_in, seg.seg);
  check_same_dtype(kOp, "logp_old", old, "logp_new", now);
  check_same_dtype(kOp, "adv", adv, "logp_new", now);
  return {seg,
          now,
          old,
          adv,
          {eps_lo, eps_hi,
           ratio == "token"   ? RatioBy::token
           : ratio == "joint" ? RatioBy::joint
                              : RatioBy::geo_mean,
           weight == "length"},
          validate,
          make_out(mean, now, seg.layout, kPolicyStats, with_slope)};
}

ValueCall check_value(bool with_slope, const Tensor& v_new, const Tensor& v_old,
                      const Tensor& ret_in, const Tensor& mask_in, double clip,
                      const std::string& agg, double denom, const OptTensor& cu_seqlens) {
  constexpr auto kOp = "ma_ppo_value_loss";
  TENFOLD_CHECK_VALUE(clip >= 0.0, "tenfold::", kOp, ": clip must be at least 0, got ", clip);
  const MeanRule mean = to_mean(kOp, agg, denom);
  check_bytes(kOp, "mask", mask_in);
  const Layout layout = check_layout(kOp, "mask", mask_in, cu_seqlens);
  const Tensor now = check_rows(kOp, "v_new", v_new, mask_in);
  const Tensor old = check_rows(kOp, "v_old", v_old, mask_in);
  const Tensor ret = check_rows(kOp, "ret", ret_in, mask_in);
  check_same_dtype(kOp, "v_old", old, "v_new", now);
  check_same_dtype(kOp, "ret", ret, "v_new", now);
  return {layout,
          as_contiguous(mask_in),
          now,
          old,
          ret,
          clip,
          make_out(mean, now, layout, kValueStats, with_slope)};
}

SlopeCall check_slope(const Tensor& grad, const Tensor& slope_in, const Tensor& scale,
                      const OptTensor& cu_seqlens) {
  constexpr auto kOp = "ma_ppo_loss_backward";
  const Layout layout = check_layout(kOp, "slope", slope_in, cu_seqlens);
  const Tensor slope = check_rows(kOp, "slope", slope_in, slope_in);
  TENFOLD_CHECK_VALUE(grad.numel() == 1, "tenfold::", kOp, ": grad must be 0-d, got ",
                      shape_str(grad));
  check_same_dtype(kOp, "grad", grad, "slope", slope);
  check_same_device(kOp, "grad", grad, "slope", slope);
  check_same_device(kOp, "scale", scale, "slope", slope);
  TENFOLD_CHECK_VALUE(scale.scalar_type() == ScalarType::Double && scale.dim() == 1 &&
                          scale.sizes()[0] == layout.rows.count,
                      "tenfold::", kOp, ": scale must be float64 [", layout.rows.count, "], got ",
                      dtype_name(scale.scalar_type()), " ", shape_str(scale));
  return {layout, grad, slope, as_contiguous(scale),
          new_tokens(slope, layout, slope.scalar_type())};
}

}  // namespace tenfold

// The _forward forms give, beside loss and stats, what the backward needs: the derivative of every
// term (slope, as the input) and the weight of a row's terms in the loss (scale, float64 [B]). On a
// CPU that weight is in the slopes already, and scale is 1. validate: on the CPU, ValueError unless
// segments are numbered in order; elsewhere they are not looked at.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "ma_ppo_policy_loss(Tensor logp_new, Tensor logp_old, Tensor adv, Tensor seg, "
      "float eps_lo=0.2, float eps_hi=0.2, str ratio=\"token\", str agg=\"token_mean\", "
      "float denom=0.0, *, str weight=\"macro\", Tensor? cu_seqlens=None, bool validate=False) "
      "-> (Tensor loss, Tensor stats)");
  m.def(
      "ma_ppo_policy_loss_forward(Tensor logp_new, Tensor logp_old, Tensor adv, Tensor seg, "
      "float eps_lo=0.2, float eps_hi=0.2, str ratio=\"token\", str agg=\"token_mean\", "
      "float denom=0.0, *, str weight=\"macro\", Tensor? cu_seqlens=None, bool validate=False) "
      "-> (Tensor loss, Tensor stats, Tensor slope, Tensor scale)");
  m.def(
      "ma_ppo_value_loss(Tensor v_new, Tensor v_old, Tensor ret, Tensor mask, float clip=0.2, "
      "str agg=\"token_mean\", float denom=0.0, *, Tensor? cu_seqlens=None) "
      "-> (Tensor loss, Tensor stats)");
  m.def(
      "ma_ppo_value_loss_forward(Tensor v_new, Tensor v_old, Tensor ret, Tensor mask, "
      "float clip=0.2, str agg=\"token_mean\", float denom=0.0, *, Tensor? cu_seqlens=None) "
      "-> (Tensor loss, Tensor stats, Tensor slope, Tensor scale)");
  m.def(
      "ma_ppo_loss_backward(Tensor grad, Tensor slope, Tensor scale, *, Tensor? cu_seqlens=None) "
      "-> Tensor");
}
