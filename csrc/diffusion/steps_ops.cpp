// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of vdiff_step.
#include "diffusion/steps_ops.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "core/contiguous.h"

namespace tenfold {
namespace {

// Of a CPU.
void check_order(const char* op, const Tensor& t, const Tensor& u, int64_t samples) {
  if (!t.is_cpu()) return;
  const PerSample from = per_sample(t), to = per_sample(u);
  for (int64_t i = 0; i < samples; ++i)
    TENFOLD_CHECK_VALUE(to[i] <= from[i], "tenfold::", op, ": u must be at most t, got u = ", to[i],
                        " and t = ", from[i], " at ", i);
}

void check_guidance(const char* op, const Tensor& guidance, bool free) {
  if (!guidance.is_cpu()) {
    TENFOLD_CHECK_VALUE(free, "tenfold::", op, ": guidance needs v_uncond, which is None");
    return;
  }
  const PerSample g = per_sample(guidance);
  for (int64_t i = 0; i < guidance.numel(); ++i) {
    TENFOLD_CHECK_VALUE(std::isfinite(g[i]), "tenfold::", op, ": guidance must be finite, got ",
                        g[i], " at ", i);
    TENFOLD_CHECK_VALUE(free || g[i] == 1.0, "tenfold::", op, ": guidance ", g[i],
                        " needs v_uncond, which is None");
  }
}

}  // namespace

StepCall check_step(const char* op, const Tensor* z_next, const OptTensor& x0_hat,
                    const StepInputs& in) {
  check_signal(op, "z", in.z);
  check_velocity(op, "z", in.z, "v", in.v);
  if (in.v_uncond) {
    check_beside(op, "v", in.v, "v_uncond", *in.v_uncond);
    check_same_device(op, "z", in.z, "v_uncond", *in.v_uncond);
  }
  check_numbers(op, "z", in.z, "t", in.t);
  check_numbers(op, "z", in.z, "u", in.u);
  if (in.guidance) check_numbers(op, "z", in.z, "guidance", *in.guidance);
  TENFOLD_CHECK_VALUE(in.eta >= 0.0 && in.eta <= 1.0, "tenfold::", op,
                      ": eta must be in [0, 1], got ", in.eta);
  TENFOLD_CHECK_VALUE(in.eta == 0.0 || in.noise, "tenfold::", op, ": eta ", in.eta,
                      " needs noise, which is None");
  if (in.noise) check_beside(op, "z", in.z, "noise", *in.noise);
  TENFOLD_CHECK_VALUE(!in.clip || (*in.clip > 0.0 && std::isfinite(*in.clip)), "tenfold::", op,
                      ": clip must be finite and above 0, or None, got ", in.clip.value_or(0.0));
  check_times(op, "t", in.t);
  check_times(op, "u", in.u);
  check_order(op, in.t, in.u, in.z.sizes()[0]);
  if (in.guidance) check_guidance(op, *in.guidance, in.v_uncond.has_value());
  const bool guided = in.guidance && in.v_uncond, noisy = in.eta > 0.0;
  const StepOptions options{in.eta, in.clip.value_or(0.0), in.clip.has_value(), in.rederives,
                            in.plus_plus && guided};
  if (z_next != nullptr) {
    check_result(op, "z_next", *z_next, "z", in.z);
    if (x0_hat) check_result(op, "x0_hat", *x0_hat, "z", in.z);
  }
  const auto made = [&] { return new_output(in.z, in.z.sizes(), in.z.scalar_type()); };
  const bool fresh = z_next == nullptr;
  StepCall c{as_contiguous(in.z),
             as_contiguous(in.v),
             std::nullopt,
             std::nullopt,
             in.t,
             in.u,
             std::nullopt,
             options,
             fresh ? made() : *z_next,
             fresh ? OptTensor(made()) : x0_hat,
             fresh,
             false};
  if (guided) c.v_uncond = as_contiguous(*in.v_uncond), c.guidance = *in.guidance;
  if (noisy) c.noise = as_contiguous(*in.noise);
  if (fresh || c.z.numel() == 0) return c;
  const auto apart = [&](const char* name, const Tensor& result) {
    const auto from = [&](const char* other, const Tensor& input) {
      check_same_or_apart(op, name, result, other, input);
      c.in_place |= result.data_ptr() == input.data_ptr();
    };
    from("z", c.z);
    from("v", c.v);
    if (c.v_uncond) from("v_uncond", *c.v_uncond);
    if (c.noise) from("noise", *c.noise);
  };
  apart("z_next", c.z_next);
  if (!c.x0_hat) return c;
  apart("x0_hat", *c.x0_hat);
  check_same_or_apart(op, "x0_hat", *c.x0_hat, "z_next", c.z_next);
  TENFOLD_CHECK_VALUE(c.x0_hat->data_ptr() != c.z_next.data_ptr(), "tenfold::", op,
                      ": z_next and x0_hat must not be the same tensor");
  return c;
}

}  // namespace tenfold

// vdiff_step_ writes into z_next and x0_hat; None is not made.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "vdiff_step(Tensor z, Tensor v, Tensor? v_uncond, Tensor t, Tensor u, Tensor? guidance, "
      "float eta, Tensor? noise, float? clip, *, bool use_clipped_model_output=False, "
      "bool cfg_plus_plus=False) -> (Tensor z_next, Tensor x0_hat)");
  m.def(
      "vdiff_step_(Tensor(a!) z_next, Tensor(b!)? x0_hat, Tensor z, Tensor v, Tensor? v_uncond, "
      "Tensor t, Tensor u, Tensor? guidance, float eta, Tensor? noise, float? clip, *, "
      "bool use_clipped_model_output=False, bool cfg_plus_plus=False) -> ()");
}
