// SPDX-License-Identifier: Apache-2.0
// CPU registration of vdiff_noise, vdiff_noise_rng and vdiff_loss. Sums of blocks of a fixed size
// are added in order: results do not depend on threads.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "core/cpu/past_caches.h"
#include "core/dispatch.h"
#include "diffusion/cpu/spans.h"
#include "diffusion/velocity_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerElement = 4e-4, kMicrosPerDrawn = 1e-3;
constexpr int64_t kLossBlock = 8192;  // elements

char* at(void* data, int64_t element, int64_t size) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + element * size;
}

void wide_noise(const NoiseCall& c, VdiffAngle angle, int64_t from, int64_t n) {
  const auto* const x0 = data_as<double>(c.x0) + from;
  const double* const noise = c.noise ? data_as<double>(*c.noise) + from : nullptr;
  auto *const z = static_cast<double*>(c.z_data()), *const v = static_cast<double*>(c.v_data());
  float four[4];
  for (int64_t i = 0; i < n; ++i) {
    const auto p = static_cast<uint64_t>(from + i);
    if (noise == nullptr && (i == 0 || p % 4 == 0)) four_normals(c.stream, p / 4, four);
    const double x = x0[i], e = noise != nullptr ? noise[i] : four[p % 4];
    if (z != nullptr) z[from + i] = angle.a * x + angle.s * e;
    if (v != nullptr) v[from + i] = angle.a * e - angle.s * x;
  }
}

void run_noise(const NoiseCall& c) {
  const int64_t each = c.each(), size = static_cast<int64_t>(c.x0.element_size());
  const bool wide = c.x0.scalar_type() == ScalarType::Double;
  const bool past =
      !c.in_place && past_caches(c.samples() * each * size * (c.z && c.v ? 2 : 1), c.fresh);
  const PerSample t = per_sample(c.t);
  const double micros = c.noise ? kMicrosPerElement : kMicrosPerDrawn;
  for_spans(c.samples(), each, micros, [&](int64_t sample, int64_t first, int64_t n) {
    const VdiffAngle angle = vdiff_angle(t[sample]);
    const int64_t from = sample * each + first;
    if (wide) return wide_noise(c, angle, from, n);
    const NoiseSpan span{to_dtype(c.x0.scalar_type()),
                         past,
                         static_cast<float>(angle.a),
                         static_cast<float>(angle.s),
                         at(c.x0.data_ptr(), from, size),
                         c.noise ? at(c.noise->data_ptr(), from, size) : nullptr,
                         at(c.z_data(), from, size),
                         at(c.v_data(), from, size),
                         n,
                         c.stream,
                         from};
    TENFOLD_ISA_CALL(vdiff_noise, span);
  });
}

// The sum of squares, or the gradient times factor.
double wide_loss(const LossCall& c, VdiffAngle angle, double factor, int64_t from, int64_t n) {
  const auto *const x0 = data_as<double>(c.x0), *const noise = data_as<double>(c.noise);
  const auto* const v_hat = data_as<double>(c.v_hat);
  double* const grad = c.grad ? data_as<double>(c.result) : nullptr;
  double sum = 0.0;
  for (int64_t i = from; i < from + n; ++i) {
    const double d = v_hat[i] - (angle.a * noise[i] - angle.s * x0[i]);
    sum += d * d;
    if (grad != nullptr) grad[i] = factor * d;
  }
  return sum;
}

double some_loss(const LossCall& c, double t, double factor, bool past, int64_t from, int64_t n) {
  const VdiffAngle angle = vdiff_angle(t);
  if (c.x0.scalar_type() == ScalarType::Double) return wide_loss(c, angle, factor, from, n);
  const auto size = static_cast<int64_t>(c.x0.element_size());
  const auto v_size = static_cast<int64_t>(c.v_hat.element_size());
  const LossSpan span{to_dtype(c.x0.scalar_type()),
                      to_dtype(c.v_hat.scalar_type()),
                      past,
                      static_cast<float>(angle.a),
                      static_cast<float>(angle.s),
                      at(c.v_hat.data_ptr(), from, v_size),
                      at(c.x0.data_ptr(), from, size),
                      at(c.noise.data_ptr(), from, size),
                      c.grad ? at(c.result.data_ptr(), from, v_size) : nullptr,
                      static_cast<float>(factor),
                      n};
  return TENFOLD_ISA_CALL(vdiff_loss, span);
}

double number(const Tensor& t, int64_t i) {
  const int64_t k = i * t.strides()[0];
  return t.scalar_type() == ScalarType::Double ? data_as<double>(t)[k] : data_as<float>(t)[k];
}

void run_loss_backward(const LossCall& c) {
  const int64_t each = c.each();
  const auto v_size = static_cast<int64_t>(c.v_hat.element_size());
  const bool past = past_caches(c.samples() * each * v_size, true);
  const PerSample t = per_sample(c.t);
  for_spans(c.samples(), each, kMicrosPerElement, [&](int64_t sample, int64_t first, int64_t n) {
    const double factor = 2.0 * number(*c.grad, sample) / static_cast<double>(each);
    some_loss(c, t[sample], factor, past, sample * each + first, n);
  });
}

void run_loss(const LossCall& c) {
  if (c.grad) return run_loss_backward(c);
  const int64_t each = c.each(), blocks = ceil_div(each, kLossBlock);
  const PerSample t = per_sample(c.t);
  std::vector<double> sums(static_cast<size_t>(c.samples() * blocks));
  const auto size = static_cast<double>(std::min(kLossBlock, each));
  parallel_for(c.samples() * blocks, kMicrosPerElement * size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, first = i % blocks * kLossBlock;
      sums[i] = some_loss(c, t[sample], 0.0, false, sample * each + first,
                          std::min(kLossBlock, each - first));
    }
  });
  for (int64_t b = 0; b < c.samples(); ++b) {
    double total = 0.0;
    for (int64_t i = 0; i < blocks; ++i) total += sums[b * blocks + i];
    total /= static_cast<double>(each);  // of nothing: NaN, as torch's mean
    if (c.result.scalar_type() == ScalarType::Double) {
      data_as<double>(c.result)[b] = total;
    } else {
      data_as<float>(c.result)[b] = static_cast<float>(total);
    }
  }
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::VelocityOps<&tenfold::cpu::run_noise, &tenfold::cpu::run_loss>;
  m.impl("vdiff_noise", TORCH_BOX(&Ops::noise));
  m.impl("vdiff_noise_", TORCH_BOX(&Ops::noise_out));
  m.impl("vdiff_noise_rng", TORCH_BOX(&Ops::noise_rng));
  m.impl("vdiff_noise_rng_", TORCH_BOX(&Ops::noise_rng_out));
  m.impl("vdiff_loss", TORCH_BOX(&Ops::loss));
  m.impl("vdiff_loss_backward", TORCH_BOX(&Ops::loss_backward));
}
