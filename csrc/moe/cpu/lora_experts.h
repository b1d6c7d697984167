// SPDX-License-Identifier: Apache-2.0
// The expert block whose experts are LoRA pairs on one frozen SwiGLU block. The base products are
// made once per token, not per slot, since down is linear: with a slot's a = silu(g) u,
//   g = x W_g^T + low_g B_g^T, low_g = scale x A_g^T;   u likewise
//   out[t] = (sum over slots of w a) W_d^T + sum over slots of low_d B_d^T,  low_d = scale w a
//   A_d^T
// Backward of G = the gradient of out:
//   up = scale G[t] B_d;  y' = G W_d [t] + up A_d;  [dg, du], w a, dw as without LoRA;
//   dlow = scale [dg B_g, du B_u];  dx = (sum of dg) W_g + (sum of du) W_u + sum of dlow A;
//   dA_d = up^T (w a), dB_d = G^T low_d, dA_g = dlow_g^T x, dB_g = dg^T low_g, base likewise.
#pragma once

#include "moe/cpu/routing.h"

namespace tenfold::cpu {

class LoraExperts {
 public:
  LoraExperts(const char* op, const LoraCall& c, bool allow_sentinel);

  // hidden [S, 2 f] unless null; low [S, 2 r].
  void forward(void* hidden, void* low, void* out) const;

  // Null: not wanted.
  struct Gradients {
    void* x;
    void *base[3], *a[3], *b[3];
    float* weight;
  };
  void backward(const Tensor& grad, const Tensor& hidden, const Tensor& low,
                const Gradients& out) const;

  int64_t num_slots() const { return static_cast<int64_t>(slots_.order.size()); }

 private:
  void activate(void* hidden, const void* low, void* wa) const;
  void activate_backward(const Tensor& grad, const void* hidden, const void* up, void* both,
                         void* wa, float* weight) const;
  void down_low(const void* wa, void* low) const;
  void base_gradients(const Tensor& grad, const void* wa, const void* tokens,
                      const Gradients& out) const;
  GroupedProduct pair(const MoeRows& one, const MoeRows& other, int64_t depth, int64_t cols,
                      const Matrices& w_one, const Matrices& w_other) const;
  GroupedProduct single(const MoeRows& a, int64_t depth, int64_t cols, const Matrices& w) const;
  MoeRows part(const void* rows, int64_t i, int64_t cols) const;
  char* at(const void* rows, int64_t col) const;
  Groups tokens() const { return {all_, 1}; }

  const LoraCall& c_;
  Isa isa_;
  Dtype dtype_;
  SortedSlots slots_;
  std::vector<float> weights_;
  Groups groups_;
  int64_t all_[2];
};

}  // namespace tenfold::cpu
