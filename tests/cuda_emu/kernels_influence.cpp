// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `influence`, for ctypes. The launch code is the
// kernels' own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "influence/cuda/markov_kernel.cuh"
#include "influence/cuda/outer_dot_kernel.cuh"
#include "influence/cuda/tuples_kernel.cuh"

namespace {

template <class F>
void with_factors(int64_t dtype, F f) {
  if (dtype == 0) f.template operator()<float>();
  if (dtype == 1) f.template operator()<bf16_t>();
  if (dtype == 3) f.template operator()<double>();
}

template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}

enum { kScan, kScanBack, kStep, kStepBack };

}  // namespace

// t: factors order lengths y y0 mask grad out of_y of_y0, some of them null
// n: dtype what plane row order_wide batch rows mean lengths_wide lags tests runs steps residual
//    y_run y_step y0_run y0_lag mask_run mask_step grad_run grad_step stretch
API void emu_markov(void* const* t, const int64_t* n) {
  Memory memory;
  with_factors(n[0], [&]<class T>() {
    using R = Real<T>;
    const MarkovArgs<T> a{as<T>(t[0]),
                          n[2],
                          n[3],
                          {ints(t[1], n[4]), n[5], n[6], n[7] != 0},
                          ints(t[2], n[8]),
                          n[9],
                          n[10],
                          n[11],
                          n[12],
                          n[13] != 0,
                          as<R>(t[3]),
                          n[14],
                          n[15],
                          as<R>(t[4]),
                          n[16],
                          n[17],
                          as<uint8_t>(t[5]),
                          n[18],
                          n[19]};
    const Upstream<R> grad{as<R>(t[6]), n[20], n[21]};
    if (n[1] == kScan) launch_scan(a, as<R>(t[7]), memory.room(), nullptr, n[22]);
    if (n[1] == kScanBack)
      launch_scan_backward(a, grad, as<T>(t[7]), as<R>(t[9]), memory.room(), nullptr, n[22]);
    if (n[1] == kStep) launch_onestep(a, as<R>(t[7]), nullptr);
    if (n[1] != kStepBack) return;
    if (t[8] != nullptr || t[9] != nullptr)  // of no steps the first has no memory
      launch_past(a, grad, as<R>(t[8]), as<R>(t[9]), nullptr);
    launch_factor_gradient(a, grad, as<T>(t[7]), nullptr);
  });
}

// t: h g ids tests hist grad pred of_h of_g of_hist, the last five or null
// n: dtype h_plane h_row g_plane g_row ids_wide batch rows mean tests_wide lags num_tests dim count
//    hist_row residual
API void emu_tuples(void* const* t, const int64_t* n) {
  with_factors(n[0], [&]<class T>() {
    using R = Real<T>;
    const TupleArgs<T> a{as<T>(t[0]),
                         as<T>(t[1]),
                         n[1],
                         n[2],
                         n[3],
                         n[4],
                         {ints(t[2], n[5]), n[6], n[7], n[8] != 0},
                         ints(t[3], n[9]),
                         n[10],
                         n[11],
                         n[12],
                         n[13],
                         as<R>(t[4]),
                         n[14],
                         n[15] != 0};
    if (t[6] != nullptr)
      return launch_tuples(a, static_cast<const R*>(nullptr), as<R>(t[6]), nullptr);
    launch_tuples_backward(a, as<const R>(t[5]), as<T>(t[7]), as<T>(t[8]), as<R>(t[9]), nullptr);
  });
}

// n: dtype examples tokens other_examples other_tokens v d paired v_vectors d_vectors, then
//    (example, token) strides of each
API void emu_outer_dot(void* const* t, float* out, const int64_t* n) {
  const auto rows = [&](int i) { return TokenRows{t[i], n[10 + 2 * i], n[11 + 2 * i]}; };
  const OuterDotArgs a{rows(0), rows(1), rows(2), rows(3),   n[1],      n[2],      n[3],
                       n[4],    n[5],    n[6],    n[7] != 0, n[8] != 0, n[9] != 0, out};
  with_dtype(n[0], [&]<class T>() { launch_outer_dot<T>(a, nullptr); });
}
