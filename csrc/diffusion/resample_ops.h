// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of fir_down2, fir_up2_cat and their gradients share.
#pragma once

#include "diffusion/resample.h"
#include "diffusion/signals.h"

namespace tenfold {

struct FirCall {
  Fir kind;
  Tensor x;        // rows of neighbours
  OptTensor skip;  // likewise; copied behind the rows that are made
  Tensor y;
  int64_t batch, channels, length;  // of fir_at; channels that are made
  int64_t outputs;                  // of a row
  bool fresh;

  FirRows in() const { return {x.data_ptr(), x.strides()[0], x.strides()[1]}; }
  FirRows out() const { return {y.data_ptr(), y.strides()[0], y.strides()[1]}; }
  int64_t skipped() const { return skip ? skip->sizes()[1] : 0; }
};

FirCall check_fir_down2(const char* op, const Tensor* out, const Tensor& x);
FirCall check_fir_down2_backward(const Tensor& grad, int64_t length);
FirCall check_fir_up2_cat(const char* op, const Tensor* out, const Tensor& x,
                          const OptTensor& skip);
FirCall check_fir_up2_backward(const Tensor& grad, int64_t channels);

template <auto kRun>
struct FirOps {
  static Tensor run(const FirCall& c) {
    kRun(c);
    return c.y;
  }
  static Tensor down(Tensor x) { return run(check_fir_down2("fir_down2", nullptr, x)); }
  static void down_out(Tensor out, Tensor x) { run(check_fir_down2("fir_down2_", &out, x)); }
  static Tensor down_backward(Tensor grad, int64_t length) {
    return run(check_fir_down2_backward(grad, length));
  }
  static Tensor up(Tensor x, OptTensor skip) {
    return run(check_fir_up2_cat("fir_up2_cat", nullptr, x, skip));
  }
  static void up_out(Tensor out, Tensor x, OptTensor skip) {
    run(check_fir_up2_cat("fir_up2_cat_", &out, x, skip));
  }
  static Tensor up_backward(Tensor grad, int64_t channels) {
    return run(check_fir_up2_backward(grad, channels));
  }
};

}  // namespace tenfold
