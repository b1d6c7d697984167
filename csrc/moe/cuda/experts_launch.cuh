// SPDX-License-Identifier: Apache-2.0
// Launches of experts_launch.h: the grouped products, and the block of whole experts.
#pragma once

#include "moe/cuda/slot_products.cuh"

namespace tenfold::cuda {

template <class T>
void grouped_gemm(const GroupedGemmCall& c, const ExpertLimits& limits, cudaStream_t stream) {
  const PlainProduct p{{c.offsets, c.groups, c.slots},
                       product_rows<T>(c.a, c.depth, c.gather, c.a_rows),
                       one_matrix<T>(c.w, c.trans_w ? c.depth : c.cols),
                       c.trans_w ? Lies::along : Lies::across,
                       c.depth,
                       c.cols,
                       true};
  launch_plain<T>(p, store_rows<T>(c.out, c.cols), limits, stream);
}

template <class T>
void grouped_wgrad(const GroupedWgradCall& c, cudaStream_t stream) {
  launch_wgrad<T>({c.offsets, c.groups, c.slots}, product_rows<T>(c.dy, c.cols), c.cols,
                  product_rows<T>(c.a, c.depth, c.gather, c.a_rows), c.depth, c.out, stream);
}

// Rows [f, 2 f) of gate_up are up's.
template <class T>
ProductMatrices gate_and_up(const ExpertBlock& b, int64_t split) {
  DeviceMatrices up = b.gate_up;
  up.data = static_cast<const T*>(up.data) + b.ffn * up.stride;
  return two_matrices<T>(b.gate_up, up, split, b.dim);
}

template <class T>
void experts_forward(const ExpertBlock& b, void* hidden, void* out, const ExpertLimits& limits,
                     const Room& room, cudaStream_t stream) {
  const SlotProducts<T> run(b, limits, room, stream);
  const int64_t f = b.ffn;
  T* const a = run.elements(b.slots() * f);
  auto* const pre = static_cast<T*>(hidden);
  const StoreSwiglu<T> swiglu{
      {}, 0, nullptr, a, pre, f, whole_twos<T>(a, f) && (pre == nullptr || whole_twos<T>(pre, f))};
  run.template product<Lies::along, true>(
      GroupedArgs<StoreSwiglu<T>>{run.slots(), run.of_slots(b.x, b.dim), gate_and_up<T>(b, f),
                                  b.dim, f, 1, false, 0, 0, swiglu});
  const PlainProduct down{run.slots(), run.rows(a, f, f), one_matrix<T>(b.down, f), Lies::along, f,
                          b.dim};
  run.to_tokens(down, run.factor(), nullptr, out);
}

template <class T>
void experts_backward(const ExpertBlock& b, const DeviceRows& grad, const void* hidden,
                      const ExpertGradients& out, const ExpertLimits& limits, const Room& room,
                      cudaStream_t stream) {
  const SlotProducts<T> run(b, limits, room, stream);
  const int64_t f = b.ffn, s = b.slots();
  T *const both = run.elements(s * 2 * f), *const wa = run.elements(s * f);
  float* const dots = run.floats(cuts(f, kDotCols) * s);
  const auto* const pre = static_cast<const T*>(hidden);
  const ProductRows g = run.of_slots(grad, b.dim);
  const bool twos = whole_twos<T>(pre, f) && whole_twos<T>(both, f) && whole_twos<T>(wa, f);
  const StoreSwigluBackward<T> back{{}, run.factor(), pre, both, wa, f, twos, dots, s};
  run.template product<Lies::across, false>(GroupedArgs<StoreSwigluBackward<T>>{
      run.slots(), g, one_matrix<T>(b.down, f), b.dim, f, 1, false, 0, 0, back});
  run.add_dots(dots, cuts(f, kDotCols), false, out.weight);
  const ProductRows d_hidden = run.rows(both, 2 * f, 2 * f);
  run.wgrad(run.slots(), d_hidden, 2 * f, run.of_slots(b.x, b.dim), b.dim, out.gate_up);
  run.wgrad(run.slots(), g, b.dim, run.rows(wa, f, f), f, out.down);
  if (out.x == nullptr) return;
  const PlainProduct down{run.slots(),  d_hidden, one_matrix<T>(b.gate_up, b.dim),
                          Lies::across, 2 * f,    b.dim};
  run.to_tokens(down, nullptr, nullptr, out.x);
}

}  // namespace tenfold::cuda
