// SPDX-License-Identifier: Apache-2.0
// CPU registration of fusion_mse and fusion_mse_backward: a task per chunk of a group's omega.
#include "attention/fusion_mse.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "attention/heads_ops.h"
#include "core/cpu/past_caches.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

// The chunks of all groups.
struct Chunks {
  const float* data;
  int64_t groups, heads, dims, plane = heads * dims;
  int64_t of_group = (plane + kFusionChunk - 1) / kFusionChunk;

  int64_t first(int64_t i) const {
    return i / of_group * heads * plane + i % of_group * kFusionChunk;
  }
  FusionChunk operator[](int64_t i) const {
    const int64_t left = plane - i % of_group * kFusionChunk;
    return {data + first(i), plane, heads, std::min(left, kFusionChunk)};
  }
  template <class F>
  void for_each(const F& f) const {
    const double micros = static_cast<double>(heads * std::min(plane, kFusionChunk)) * 2e-4;
    parallel_for(groups * of_group, micros, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, i / of_group);
    });
  }
};

Chunks chunks_of(const Tensor& omega) {
  return {data_as<float>(omega), omega.sizes()[0], omega.sizes()[1], omega.sizes()[3]};
}

Tensor fusion_mse_op(Tensor omega_in) {
  check_fusion_omega("fusion_mse", omega_in);
  const Tensor omega = torch::stable::contiguous(omega_in);
  const Chunks chunks = chunks_of(omega);
  const Tensor out = new_output(omega, {chunks.groups}, ScalarType::Float);
  std::vector<float> part(chunks.groups * chunks.of_group);
  chunks.for_each(
      [&](int64_t i, int64_t) { part[i] = TENFOLD_ISA_CALL(fusion_deviation, chunks[i]); });
  for (int64_t n = 0; n < chunks.groups; ++n) {
    double sum = 0.0;
    for (int64_t j = 0; j < chunks.of_group; ++j) sum += part[n * chunks.of_group + j];
    const double scale = fusion_mse_scale(chunks.heads, chunks.dims);
    data_as<float>(out)[n] = chunks.heads < 2 ? 0.0f : static_cast<float>(sum * scale);
  }
  return out;
}

Tensor fusion_mse_backward_op(Tensor dout, Tensor omega_in) {
  check_fusion_mse_backward("fusion_mse_backward", dout, omega_in);
  const Tensor omega = torch::stable::contiguous(omega_in);
  const Chunks chunks = chunks_of(omega);
  const int64_t g = chunks.heads, d = chunks.dims, step = dout.strides()[0];
  const Tensor out = new_output(omega, {chunks.groups, g, g, d}, ScalarType::Float);
  const float* const grad = data_as<float>(dout);
  float* const to = data_as<float>(out);
  const double scale = 2.0 * fusion_mse_scale(g, d);
  const bool past = past_caches(out.numel() * 4, true) && chunks.plane % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(to) % 64 == 0;
  chunks.for_each([&](int64_t i, int64_t group) {
    const auto factor = static_cast<float>(grad[group * step] * scale);
    TENFOLD_ISA_CALL(fusion_deviation_backward, chunks[i], factor, to + chunks.first(i), past);
  });
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("fusion_mse", TORCH_BOX(&tenfold::cpu::fusion_mse_op));
  m.impl("fusion_mse_backward", TORCH_BOX(&tenfold::cpu::fusion_mse_backward_op));
}
