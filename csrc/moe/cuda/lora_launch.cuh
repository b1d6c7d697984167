// SPDX-License-Identifier: Apache-2.0
// Launches of experts_launch.h: the expert block of LoRA pairs on a shared block. The formulas are
// those of cpu/lora_experts.h.
#pragma once

#include "moe/cuda/slot_products.cuh"
#include "moe/experts_parts.h"

namespace tenfold::cuda {

template <class T>
class LoraProducts {
 public:
  LoraProducts(const LoraBlock& b, const ExpertLimits& limits, const Room& room,
               cudaStream_t stream)
      : b_(b), run_(b, limits, room, stream), f_(b.ffn), r_(b.rank), s_(b.slots()) {}

  void forward(T* hidden, T* low, T* out) const {
    T *const wa = run_.elements(s_ * f_), *const of_down = run_.elements(s_ * r_);
    T* const summed = run_.elements(b_.tokens * f_);
    run_.plain({run_.slots(), run_.of_slots(b_.x, b_.dim), both(b_.a, r_, b_.dim), Lies::along,
                b_.dim, 2 * r_},
               store_rows<T>(low, 2 * r_, false, b_.scale));
    activate(low, hidden, wa);
    down_low(wa, of_down);
    run_.sum_slots(wa, f_, summed);
    const PlainProduct own{
        run_.slots(), run_.rows(of_down, r_, r_), one_matrix<T>(b_.b[kDown], r_), Lies::along, r_,
        b_.dim};
    const PlainProduct base{
        run_.tokens(), run_.rows(summed, f_, f_), shared(kDown, f_), Lies::along, f_, b_.dim};
    run_.to_tokens(own, nullptr, &base, out);
  }

  void backward(const DeviceRows& grad, const T* hidden, const T* low,
                const LoraGradients& out) const {
    const int64_t f = f_, r = r_, d = b_.dim;
    T *const up = run_.elements(s_ * r), *const pre = run_.elements(s_ * 2 * f);
    T *const wa = run_.elements(s_ * f), *const dlow = run_.elements(s_ * 2 * r);
    T* const summed = run_.elements(b_.tokens * 2 * f);
    const ProductRows g = run_.of_slots(grad, d), x = run_.of_slots(b_.x, d);
    run_.plain({run_.slots(), g, one_matrix<T>(b_.b[kDown], r), Lies::across, d, r},
               store_rows<T>(up, r, false, b_.scale));
    activate_backward(grad, hidden, up, pre, wa, out.weight);
    run_.wgrad(run_.slots(), run_.rows(up, r, r), r, run_.rows(wa, f, f), f, out.a[kDown]);
    for (int i = 0; i < 2; ++i) {
      run_.wgrad(run_.slots(), half(pre, i, f), f, half(low, i, r), r, out.b[i]);
      run_.plain({run_.slots(), half(pre, i, f), one_matrix<T>(b_.b[i], r), Lies::across, f, r},
                 store_rows<T>(dlow + i * r, 2 * r, false, b_.scale));
      run_.wgrad(run_.slots(), half(dlow, i, r), r, x, d, out.a[i]);
    }
    run_.sum_slots(pre, 2 * f, summed);
    base_gradients(grad, wa, summed, out);
    if (out.x != nullptr) {
      const PlainProduct own{
          run_.slots(), run_.rows(dlow, 2 * r, 2 * r), both(b_.a, r, d), Lies::across, 2 * r, d};
      const PlainProduct base{run_.tokens(),
                              run_.rows(summed, 2 * f, 2 * f),
                              two_matrices<T>(plain(kGate), plain(kUp), f, d),
                              Lies::across,
                              2 * f,
                              d};
      run_.to_tokens(own, nullptr, &base, out.x);
    }
    if (out.b[kDown] == nullptr) return;
    down_low(wa, up);  // what was there is no longer needed
    run_.wgrad(run_.slots(), g, d, run_.rows(up, r, r), r, out.b[kDown]);
  }

 private:
  DeviceMatrices plain(int i) const { return {b_.base[i].data, 0, b_.base[i].stride}; }
  ProductMatrices shared(int i, int64_t cols) const { return one_matrix<T>(plain(i), cols); }
  ProductMatrices both(const DeviceMatrices (&m)[3], int64_t split, int64_t cols) const {
    return two_matrices<T>(m[kGate], m[kUp], split, cols);
  }
  // Half i of rows of 2 `cols`.
  ProductRows half(const T* rows, int i, int64_t cols) const {
    return run_.rows(rows + i * cols, 2 * cols, cols);
  }

  // w a of all slots, and pre-activations unless `hidden` is null.
  void activate(const T* low, T* hidden, T* wa) const {
    const int64_t width = run_.round_width(2 * b_.tokens, f_);
    float* const base = run_.floats(2 * b_.tokens * width);
    const bool twos = whole_twos<T>(wa, f_) && (hidden == nullptr || whole_twos<T>(hidden, f_));
    for (int64_t first = 0; first < f_; first += width) {
      const int64_t cols = std::min(width, f_ - first);
      const ProductMatrices w = two_matrices<T>(plain(kGate), plain(kUp), cols, b_.dim);
      run_.plain({run_.tokens(), product_rows<T>(b_.x, b_.dim),
                  columns_from<T>(w, Lies::along, first), Lies::along, b_.dim, 2 * cols},
                 store_rows<T>(base, 2 * cols, true));
      const StoreSwiglu<T> swiglu{{base, 2 * cols, run_.token()},
                                  cols,
                                  run_.factor(),
                                  wa + first,
                                  hidden == nullptr ? nullptr : hidden + first,
                                  f_,
                                  twos};
      // Gate multiplies the first half of low, up the other.
      ProductRows left = run_.rows(low, 2 * r_, 2 * r_);
      left.vectors &= r_ * sizeof(T) % 16 == 0;
      const ProductMatrices own = columns_from<T>(both(b_.b, f_, r_), Lies::along, first);
      run_.template product<Lies::along, true>(
          GroupedArgs<StoreSwiglu<T>>{run_.slots(), left, own, r_, cols, 2, false, 0, 0, swiglu});
    }
  }

  // scale w a A_d^T
  void down_low(const T* wa, T* low) const {
    run_.plain(
        {run_.slots(), run_.rows(wa, f_, f_), one_matrix<T>(b_.a[kDown], f_), Lies::along, f_, r_},
        store_rows<T>(low, r_, false, b_.scale));
  }

  // pre: [dg, du]; up: scale G B_d.
  void activate_backward(const DeviceRows& grad, const T* hidden, const T* up, T* pre, T* wa,
                         float* weight) const {
    const int64_t width = run_.round_width(b_.tokens, f_);
    float *const base = run_.floats(b_.tokens * width), *const dots =
                                                            run_.floats(cuts(width, kDotCols) * s_);
    const bool twos = whole_twos<T>(hidden, f_) && whole_twos<T>(pre, f_) && whole_twos<T>(wa, f_);
    if (f_ == 0) run_.add_dots(dots, 0, false, weight);
    for (int64_t first = 0; first < f_; first += width) {
      const int64_t cols = std::min(width, f_ - first);
      run_.plain(
          {run_.tokens(), product_rows<T>(grad, b_.dim),
           columns_from<T>(shared(kDown, f_), Lies::across, first), Lies::across, b_.dim, cols},
          store_rows<T>(base, width, true));
      const StoreSwigluBackward<T> back{{base, width, run_.token()},
                                        run_.factor(),
                                        hidden + first,
                                        pre + first,
                                        wa + first,
                                        f_,
                                        twos,
                                        dots,
                                        s_};
      run_.template product<Lies::across, false>(GroupedArgs<StoreSwigluBackward<T>>{
          run_.slots(), run_.rows(up, r_, r_),
          columns_from<T>(one_matrix<T>(b_.a[kDown], f_), Lies::across, first), r_, cols, 1, false,
          0, 0, back});
      run_.add_dots(dots, cuts(cols, kDotCols), first > 0, weight);
    }
  }

  // Of the frozen block, which rarely trains. `hidden`: the sum of [dg, du] over a token's slots.
  void base_gradients(const DeviceRows& grad, const T* wa, const T* hidden,
                      const LoraGradients& out) const {
    for (int i = 0; i < 2; ++i)
      run_.wgrad(run_.tokens(), half(hidden, i, f_), f_, product_rows<T>(b_.x, b_.dim), b_.dim,
                 out.base[i]);
    if (out.base[kDown] == nullptr) return;
    T* const summed = run_.elements(b_.tokens * f_);
    run_.sum_slots(wa, f_, summed);
    run_.wgrad(run_.tokens(), product_rows<T>(grad, b_.dim), b_.dim, run_.rows(summed, f_, f_), f_,
               out.base[kDown]);
  }

  const LoraBlock& b_;
  const SlotProducts<T> run_;
  int64_t f_, r_, s_;
};

template <class T>
void lora_forward(const LoraBlock& b, void* hidden, void* low, void* out,
                  const ExpertLimits& limits, const Room& room, cudaStream_t stream) {
  LoraProducts<T>(b, limits, room, stream)
      .forward(static_cast<T*>(hidden), static_cast<T*>(low), static_cast<T*>(out));
}

template <class T>
void lora_backward(const LoraBlock& b, const DeviceRows& grad, const void* hidden, const void* low,
                   const LoraGradients& out, const ExpertLimits& limits, const Room& room,
                   cudaStream_t stream) {
  LoraProducts<T>(b, limits, room, stream)
      .backward(grad, static_cast<const T*>(hidden), static_cast<const T*>(low), out);
}

}  // namespace tenfold::cuda
