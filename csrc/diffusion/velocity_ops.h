// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of vdiff_noise, vdiff_noise_rng and vdiff_loss share.
#pragma once

#include <tuple>

#include "diffusion/signals.h"
#include "diffusion/vdiff.h"

namespace tenfold {

struct NoiseCall {
  Tensor x0;        // contiguous
  OptTensor noise;  // contiguous; none: drawn from the stream
  Tensor t;
  OptTensor z, v;  // contiguous; none: not made
  NoiseStream stream{};
  bool fresh;     // nobody gave z and v
  bool in_place;  // one of them is over an input

  int64_t samples() const { return x0.sizes()[0]; }
  int64_t each() const { return x0.sizes()[1] * x0.sizes()[2]; }
  void* z_data() const { return z ? z->data_ptr() : nullptr; }
  void* v_data() const { return v ? v->data_ptr() : nullptr; }
};

// out: z and v, at least one of them; null: fresh ones. noise: none where it is drawn.
struct NoiseResults {
  const OptTensor &z, &v;
};
NoiseCall check_noise(const char* op, const NoiseResults* out, const Tensor& x0, const Tensor& t,
                      const OptTensor& noise, NoiseStream stream);

struct LossCall {
  Tensor v_hat, x0, noise, t;  // contiguous but for t
  OptTensor grad;              // float32 or float64 [B]; none: the loss is asked for
  Tensor result;               // [B], or the gradient

  int64_t samples() const { return x0.sizes()[0]; }
  int64_t each() const { return x0.sizes()[1] * x0.sizes()[2]; }
};
LossCall check_loss(const char* op, const OptTensor& grad, const Tensor& v_hat, const Tensor& x0,
                    const Tensor& noise, const Tensor& t);

// The ops, with what a backend runs.
template <auto kNoise, auto kLoss>
struct VelocityOps {
  using Two = std::tuple<Tensor, Tensor>;

  static NoiseStream stream(int64_t seed, int64_t offset) {
    return {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
  }
  static Two noise(Tensor x0, Tensor t, Tensor noise) {
    const NoiseCall c = check_noise("vdiff_noise", nullptr, x0, t, noise, {});
    kNoise(c);
    return {*c.z, *c.v};
  }
  static Two noise_rng(Tensor x0, Tensor t, int64_t seed, int64_t offset) {
    const NoiseCall c =
        check_noise("vdiff_noise_rng", nullptr, x0, t, std::nullopt, stream(seed, offset));
    kNoise(c);
    return {*c.z, *c.v};
  }
  static void noise_out(OptTensor z, OptTensor v, Tensor x0, Tensor t, Tensor noise) {
    const NoiseResults out{z, v};
    kNoise(check_noise("vdiff_noise_", &out, x0, t, noise, {}));
  }
  static void noise_rng_out(OptTensor z, OptTensor v, Tensor x0, Tensor t, int64_t seed,
                            int64_t offset) {
    const NoiseResults out{z, v};
    kNoise(check_noise("vdiff_noise_rng_", &out, x0, t, std::nullopt, stream(seed, offset)));
  }
  static Tensor loss(Tensor v_hat, Tensor x0, Tensor noise, Tensor t) {
    const LossCall c = check_loss("vdiff_loss", std::nullopt, v_hat, x0, noise, t);
    kLoss(c);
    return c.result;
  }
  static Tensor loss_backward(Tensor grad, Tensor v_hat, Tensor x0, Tensor noise, Tensor t) {
    const LossCall c = check_loss("vdiff_loss_backward", grad, v_hat, x0, noise, t);
    kLoss(c);
    return c.result;
  }
};

}  // namespace tenfold
