// SPDX-License-Identifier: Apache-2.0
// CPU registration of vdiff_step.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/cpu/past_caches.h"
#include "core/dispatch.h"
#include "diffusion/cpu/spans.h"
#include "diffusion/steps_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerElement = 5e-4;

void wide_step(const StepCall& c, const StepRule& r, double guidance, bool guided, int64_t from,
               int64_t n) {
  const auto *const z = data_as<double>(c.z), *const v = data_as<double>(c.v);
  const double* const free = guided ? data_as<double>(*c.v_uncond) : nullptr;
  const double* const noise = c.noise ? data_as<double>(*c.noise) : nullptr;
  double *const z_next = data_as<double>(c.z_next), *const x0 = c.x0_hat
                                                                    ? data_as<double>(*c.x0_hat)
                                                                    : nullptr;
  const double clip = c.options.clip;
  for (int64_t i = from; i < from + n; ++i) {
    double w = v[i], e = w;
    if (guided) {
      w = free[i] + guidance * (w - free[i]);
      e = c.options.plus_plus ? free[i] : w;
    }
    double x = r.a * z[i] - r.s * w;
    if (c.options.clips) x = x < -clip ? -clip : x > clip ? clip : x;
    double next = r.kz * z[i] + r.kw * e;
    if (c.general()) next += r.kx * x;
    if (noise != nullptr) next += r.ke * noise[i];
    z_next[i] = next;
    if (x0 != nullptr) x0[i] = x;
  }
}

void run_step(const StepCall& c) {
  const int64_t each = c.each();
  const auto size = static_cast<int64_t>(c.z.element_size());
  const auto v_size = static_cast<int64_t>(c.v.element_size());
  const bool wide = c.z.scalar_type() == ScalarType::Double;
  const bool past =
      !c.in_place && past_caches(c.samples() * each * size * (c.x0_hat ? 2 : 1), c.fresh);
  const PerSample t = per_sample(c.t), u = per_sample(c.u);
  const PerSample g = c.guidance ? per_sample(*c.guidance) : PerSample{};
  for_spans(c.samples(), each, kMicrosPerElement, [&](int64_t sample, int64_t first, int64_t n) {
    const StepRule r = step_rule(t[sample], u[sample], c.options);
    const double guidance = c.guidance ? g[sample] : 1.0;
    const bool guided = c.v_uncond && guidance != 1.0;
    const int64_t from = sample * each + first;
    if (wide) return wide_step(c, r, guidance, guided, from, n);
    const auto of = [&](const Tensor& x, int64_t bytes) { return data_as<char>(x) + from * bytes; };
    const StepSpan span{to_dtype(c.z.scalar_type()),
                        to_dtype(c.v.scalar_type()),
                        past,
                        c.general(),
                        c.options.clips,
                        c.options.plus_plus,
                        static_cast<float>(r.a),
                        static_cast<float>(r.s),
                        static_cast<float>(r.kx),
                        static_cast<float>(r.kz),
                        static_cast<float>(r.kw),
                        static_cast<float>(r.ke),
                        static_cast<float>(guidance),
                        static_cast<float>(c.options.clip),
                        of(c.z, size),
                        of(c.v, v_size),
                        guided ? of(*c.v_uncond, v_size) : nullptr,
                        c.noise ? of(*c.noise, size) : nullptr,
                        of(c.z_next, size),
                        c.x0_hat ? of(*c.x0_hat, size) : nullptr,
                        n};
    TENFOLD_ISA_CALL(vdiff_step, span);
  });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::StepOps<&tenfold::cpu::run_step>;
  m.impl("vdiff_step", TORCH_BOX(&Ops::step));
  m.impl("vdiff_step_", TORCH_BOX(&Ops::step_out));
}
