// Schemas and checks of macro_pool, macro_gae and ma_ppo_prepare.
#include "rl/returns_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {
namespace {

Tensor in_one_piece(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace

PoolBy to_pool(const char* op, const char* arg, const std::string& name) {
  if (name == "sum") return PoolBy::sum;
  if (name == "equal") return PoolBy::equal;
  if (name == "unit") return PoolBy::unit;
  if (name == "position") return PoolBy::position;
  TENFOLD_CHECK_VALUE(name == "position_early", "tenfold::", op, ": ", arg,
                      " must be one of sum, equal, unit, position, position_early, got '", name,
                      "'");
  return PoolBy::position_early;
}

Tensor check_seg(const char* op, const Tensor& seg) {
  check_int_dtype(op, "seg", seg);
  check_dim(op, "seg", seg, 2, "[B, R]");
  return in_one_piece(seg);
}

Tensor check_rows(const char* op, const char* arg, const Tensor& t, const Tensor& like) {
  const auto s = t.scalar_type();
  TENFOLD_CHECK_TYPE(s == ScalarType::Float || (s == ScalarType::Double && t.is_cpu()),
                     "tenfold::", op, ": ", arg, " must be float32 (or float64 on a CPU), got ",
                     dtype_name(s));
  TENFOLD_CHECK_VALUE(same_sizes(t, like), "tenfold::", op, ": ", arg, " must be ",
                      shape_str(like), ", got ", shape_str(t));
  TENFOLD_CHECK_VALUE(t.device() == like.device(), "tenfold::", op, ": ", arg, " must be on ",
                      device_str(like), ", got ", device_str(t));
  return in_one_piece(t);
}

Tensor check_vector(const char* op, const char* arg, const Tensor& t, const Tensor& like) {
  TENFOLD_CHECK_TYPE(t.scalar_type() == like.scalar_type(), "tenfold::", op, ": ", arg,
                     " must be ", dtype_name(like.scalar_type()), ", got ",
                     dtype_name(t.scalar_type()));
  TENFOLD_CHECK_VALUE(t.dim() == 1 && t.sizes()[0] == like.sizes()[0], "tenfold::", op, ": ", arg,
                      " must be [", like.sizes()[0], "], got ", shape_str(t));
  TENFOLD_CHECK_VALUE(t.device() == like.device(), "tenfold::", op, ": ", arg, " must be on ",
                      device_str(like), ", got ", device_str(t));
  return in_one_piece(t);
}

void check_unit_interval(const char* op, const char* arg, double value) {
  TENFOLD_CHECK_VALUE(value >= 0.0 && value <= 1.0, "tenfold::", op, ": ", arg,
                      " must be in [0, 1], got ", value);
}

PrepareArgs check_prepare(double beta, double gamma, double lam, double score_clip,
                          const std::string& sigma, const std::string& reward_reduce,
                          const std::string& discount, const std::string& kl) {
  constexpr auto kOp = "ma_ppo_prepare";
  TENFOLD_CHECK_VALUE(beta >= 0.0, "tenfold::", kOp, ": beta must be at least 0, got ", beta);
  check_unit_interval(kOp, "gamma", gamma);
  check_unit_interval(kOp, "lam", lam);
  TENFOLD_CHECK_VALUE(score_clip > 0.0, "tenfold::", kOp, ": score_clip must be above 0, got ",
                      score_clip);
  TENFOLD_CHECK_VALUE(reward_reduce == "sum" || reward_reduce == "sigma", "tenfold::", kOp,
                      ": reward_reduce must be sum or sigma, got '", reward_reduce, "'");
  TENFOLD_CHECK_VALUE(discount == "per_macro" || discount == "per_token", "tenfold::", kOp,
                      ": discount must be per_macro or per_token, got '", discount, "'");
  TENFOLD_CHECK_VALUE(kl == "k1" || kl == "k2" || kl == "k3", "tenfold::", kOp,
                      ": kl must be k1, k2 or k3, got '", kl, "'");
  return {beta,
          gamma,
          lam,
          score_clip,
          to_pool(kOp, "sigma", sigma),
          reward_reduce == "sigma",
          kl == "k1"   ? KlBy::k1
          : kl == "k2" ? KlBy::k2
                       : KlBy::k3,
          {gamma, lam, discount == "per_token"}};
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("macro_pool(Tensor x, Tensor seg, int T, str weight=\"equal\") -> Tensor");
  m.def(
      "macro_pool_backward(Tensor grad, Tensor seg, int T, str weight=\"equal\") -> Tensor");
  m.def(
      "macro_gae(Tensor value_m, Tensor reward_m, Tensor nseg, Tensor? length=None, "
      "float gamma=1.0, float lam=0.95, Tensor? bootstrap=None) -> (Tensor adv_m, Tensor ret_m)");
  m.def(
      "ma_ppo_prepare(Tensor logp_old, Tensor logp_ref, Tensor value_old, Tensor score, "
      "Tensor seg, Tensor nseg, float beta=0.05, float gamma=1.0, float lam=0.95, "
      "float score_clip=2.5, str sigma=\"equal\", str reward_reduce=\"sum\", "
      "str discount=\"per_macro\", str kl=\"k1\", Tensor? bootstrap=None) "
      "-> (Tensor adv, Tensor ret, Tensor adv_m, Tensor ret_m, Tensor kl_row)");
}
