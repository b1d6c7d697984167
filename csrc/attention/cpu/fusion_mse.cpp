// SPDX-License-Identifier: Apache-2.0
// CPU registration of fusion_mse and fusion_mse_backward: one task per row j of a group's omega.
#include "attention/fusion_mse.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "attention/heads_ops.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

double micros_per_row(int64_t g, int64_t d) {
  return static_cast<double>(g * d) * 3e-4;
}

Tensor fusion_mse_op(Tensor omega_in) {
  check_fusion_omega("fusion_mse", omega_in);
  const Tensor omega = torch::stable::contiguous(omega_in);
  const int64_t groups = omega.sizes()[0], g = omega.sizes()[1], d = omega.sizes()[3];
  const Tensor out = new_output(omega, {groups}, ScalarType::Float);
  const float* data = data_as<float>(omega);
  std::vector<float> part(groups * g);
  parallel_for(groups * g, micros_per_row(g, d), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      part[at] =
          TENFOLD_ISA_CALL(fusion_deviation, data + (at / g * g * g + at % g) * d, g * d, g, d);
  });
  for (int64_t n = 0; n < groups; ++n) {
    double sum = 0.0;
    for (int64_t j = 0; j < g; ++j) sum += part[n * g + j];
    data_as<float>(out)[n] = g < 2 ? 0.0f : static_cast<float>(sum * fusion_mse_scale(g, d));
  }
  return out;
}

Tensor fusion_mse_backward_op(Tensor dout, Tensor omega_in) {
  check_fusion_mse_backward("fusion_mse_backward", dout, omega_in);
  const Tensor omega = torch::stable::contiguous(omega_in);
  const int64_t groups = omega.sizes()[0], g = omega.sizes()[1], d = omega.sizes()[3];
  const Tensor out = new_output(omega, {groups, g, g, d}, ScalarType::Float);
  const float *data = data_as<float>(omega), *grad = data_as<float>(dout);
  const int64_t step = dout.strides()[0];
  float* to = data_as<float>(out);
  const double scale = 2.0 * fusion_mse_scale(g, d);
  parallel_for(groups * g, micros_per_row(g, d), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = (at / g * g * g + at % g) * d;
      const float factor = static_cast<float>(grad[at / g * step] * scale);
      TENFOLD_ISA_CALL(fusion_deviation_backward, data + row, to + row, g * d, g, d, factor);
    }
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("fusion_mse", TORCH_BOX(&tenfold::cpu::fusion_mse_op));
  m.impl("fusion_mse_backward", TORCH_BOX(&tenfold::cpu::fusion_mse_backward_op));
}
