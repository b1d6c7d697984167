// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of vdiff_step share.
#pragma once

#include <tuple>

#include "diffusion/signals.h"
#include "diffusion/vdiff.h"

namespace tenfold {

struct StepCall {
  Tensor z, v;                // contiguous
  OptTensor v_uncond, noise;  // contiguous; none: not looked at
  Tensor t, u;
  OptTensor guidance;
  StepOptions options;
  Tensor z_next;
  OptTensor x0_hat;
  bool fresh, in_place;

  int64_t samples() const { return z.sizes()[0]; }
  int64_t each() const { return z.sizes()[1] * z.sizes()[2]; }
  bool general() const { return options.clips || options.plus_plus; }
};

struct StepInputs {
  const Tensor &z, &v;
  const OptTensor& v_uncond;
  const Tensor &t, &u;
  const OptTensor& guidance;
  double eta;
  const OptTensor& noise;
  std::optional<double> clip;
  bool rederives, plus_plus;
};

// z_next null: fresh results.
StepCall check_step(const char* op, const Tensor* z_next, const OptTensor& x0_hat,
                    const StepInputs& in);

template <auto kStep>
struct StepOps {
  static std::tuple<Tensor, Tensor> step(Tensor z, Tensor v, OptTensor v_uncond, Tensor t, Tensor u,
                                         OptTensor guidance, double eta, OptTensor noise,
                                         std::optional<double> clip, bool rederives,
                                         bool plus_plus) {
    const StepCall c =
        check_step("vdiff_step", nullptr, std::nullopt,
                   {z, v, v_uncond, t, u, guidance, eta, noise, clip, rederives, plus_plus});
    kStep(c);
    return {c.z_next, *c.x0_hat};
  }
  static void step_out(Tensor z_next, OptTensor x0_hat, Tensor z, Tensor v, OptTensor v_uncond,
                       Tensor t, Tensor u, OptTensor guidance, double eta, OptTensor noise,
                       std::optional<double> clip, bool rederives, bool plus_plus) {
    kStep(check_step("vdiff_step_", &z_next, x0_hat,
                     {z, v, v_uncond, t, u, guidance, eta, noise, clip, rederives, plus_plus}));
  }
};

}  // namespace tenfold
