// SPDX-License-Identifier: Apache-2.0
// Device code of markov_scan and markov_onestep (influence/markov.h).
//
// One step is a thread per (run, step, test example). A scan would be a thread per (run, test
// example), of which there are few, each waiting for its gathers; so the factors of a stretch of
// steps are summed first, all at once, and then the recurrence runs over them from there: the
// stretch is as long as what it makes still fits the second cache. Backward, the same from the last
// step on; what each step says of the factors is then added up by scatter_kernel.cuh.
#pragma once

#include "core/room.h"
#include "influence/cuda/scatter_kernel.cuh"

namespace tenfold::cuda {

template <class T>
struct MarkovArgs {
  const T* factors;
  int64_t plane, row;  // elements
  Batches order;       // of R T batches
  IntArray lengths;
  int64_t lags, tests, runs, steps;
  bool residual;
  const Real<T>* y;  // a scan's is what it makes
  int64_t y_run, y_step;
  const Real<T>* y0;  // null: zeros
  int64_t y0_run, y0_lag;
  const uint8_t* mask;  // null: all of y was recorded
  int64_t mask_run, mask_step;

  __device__ int64_t length(int64_t run) const {
    if (!lengths.given()) return steps;
    const int64_t n = lengths[run];
    return n < 0 ? 0 : n > steps ? steps : n;
  }
  __device__ bool known(int64_t run, int64_t t, int64_t q) const {
    return mask == nullptr || t < 0 || mask[run * mask_run + t * mask_step + q] != 0;
  }
  // Whether all lags of step t were recorded.
  __device__ bool usable(int64_t run, int64_t t, int64_t q) const {
    bool all = true;
    for (int64_t lag = 1; mask != nullptr && lag <= lags && lag <= t; ++lag)
      all &= known(run, t - lag, q);
    return all;
  }
  // y at step t, or before step 0; 0 if it was not recorded.
  __device__ Real<T> past(int64_t run, int64_t t, int64_t q) const {
    if (t >= 0) return known(run, t, q) ? y[run * y_run + t * y_step + q] : Real<T>{0};
    return y0 != nullptr ? y0[run * y0_run + (lags + t) * y0_lag + q] : Real<T>{0};
  }
  // alpha of lag which + 1, or beta, of a run's step.
  __device__ Real<T> factor(int64_t which, int64_t batch, int64_t q, Real<T> weight) const {
    Real<T> x = order.sum(batch, factors + which * plane + q, row);
    if (order.mean) x *= weight;
    return which == 0 && residual ? x + Real<T>{1} : x;
  }
};

// out [R, T, Q]
template <class T>
static __global__ void __launch_bounds__(kFlatThreads)
    onestep_kernel(MarkovArgs<T> a, Real<T>* out) {
  const int64_t i = flat_index();
  if (i >= a.runs * a.steps * a.tests) return;
  const Split at = split(i, a.tests), step = split(at.whole, a.steps);
  const int64_t run = step.whole, t = step.rest, q = at.rest;
  Real<T> y{0};
  if (t < a.length(run) && a.usable(run, t, q)) {
    const auto weight = a.order.template weight<Real<T>>(at.whole);
    y = a.factor(a.lags, at.whole, q, weight);
    for (int64_t lag = 1; lag <= a.lags; ++lag)
      y = fused(a.factor(lag - 1, at.whole, q, weight), a.past(run, t - lag, q), y);
  }
  out[i] = y;
}

// Steps [first, first + count) of all runs: sums [planes, R, count, Q].
template <class R>
struct Stretch {
  int64_t first, count;
  R* sums;
};

template <class T>
static __global__ void __launch_bounds__(kFlatThreads)
    factors_kernel(MarkovArgs<T> a, int64_t planes, Stretch<Real<T>> s) {
  const int64_t i = flat_index(), states = a.runs * s.count * a.tests;
  if (i >= states) return;
  const Split at = split(i, a.tests), step = split(at.whole, s.count);
  const int64_t run = step.whole, t = s.first + step.rest;
  if (t >= a.length(run)) return;
  const int64_t batch = run * a.steps + t;
  const auto weight = a.order.template weight<Real<T>>(batch);
  for (int64_t p = 0; p < planes; ++p) s.sums[p * states + i] = a.factor(p, batch, at.rest, weight);
}

constexpr int kLaneThreads = 128, kStepsAhead = 8;

// A thread per (run, test example). y [R, T, Q] is what a.y is.
template <class T>
static __global__ void __launch_bounds__(kLaneThreads)
    scan_steps_kernel(MarkovArgs<T> a, Stretch<Real<T>> s, Real<T>* y) {
  using R = Real<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLaneThreads + threadIdx.x;
  if (i >= a.runs * a.tests) return;
  const Split at = split(i, a.tests);
  const int64_t run = at.whole, q = at.rest, states = a.runs * s.count * a.tests;
  int64_t here = a.length(run) - s.first;  // steps of this stretch
  here = here < 0 ? 0 : here > s.count ? s.count : here;
  const R* const sums = s.sums + run * s.count * a.tests + q;
  R* const out = y + (run * a.steps + s.first) * a.tests + q;
  if (a.lags == 1) {
    R last = a.past(run, s.first - 1, q);
    for (int64_t t = 0; t < here; t += kStepsAhead) {
      R alpha[kStepsAhead], beta[kStepsAhead];
#pragma unroll
      for (int k = 0; k < kStepsAhead; ++k) {
        const bool there = t + k < here;
        alpha[k] = there ? sums[(t + k) * a.tests] : R{0};
        beta[k] = there ? sums[states + (t + k) * a.tests] : R{0};
      }
#pragma unroll
      for (int k = 0; k < kStepsAhead; ++k) {
        if (t + k >= here) continue;
        last = fused(alpha[k], last, beta[k]);
        out[(t + k) * a.tests] = last;
      }
    }
  } else {
    for (int64_t t = 0; t < here; ++t) {
      R now = sums[a.lags * states + t * a.tests];
      for (int64_t lag = 1; lag <= a.lags; ++lag)
        now = fused(sums[(lag - 1) * states + t * a.tests], a.past(run, s.first + t - lag, q), now);
      out[t * a.tests] = now;
    }
  }
  for (int64_t t = here; t < s.count; ++t) out[t * a.tests] = R{0};
}

// lam [R, T, Q] of steps [first, end), which the stretch reaches `lags` beyond; those from `end` on
// are there already. grad: rows of strides.
template <class R>
struct Upstream {
  const R* grad;
  int64_t run, step;

  __device__ R operator()(int64_t r, int64_t t, int64_t q) const {
    return grad[r * run + t * step + q];
  }
};

template <class T>
static __global__ void __launch_bounds__(kLaneThreads, 4)  // of few threads: registers, not spills
    scan_back_kernel(MarkovArgs<T> a, Stretch<Real<T>> s, int64_t end, Upstream<Real<T>> grad,
                     Real<T>* lam) {
  using R = Real<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLaneThreads + threadIdx.x;
  if (i >= a.runs * a.tests) return;
  const Split at = split(i, a.tests);
  const int64_t run = at.whole, q = at.rest, states = a.runs * s.count * a.tests;
  const int64_t length = a.length(run), last = end < length ? end : length;
  const R* const sums = s.sums + run * s.count * a.tests + q;
  R* const out = lam + run * a.steps * a.tests + q;
  for (int64_t t = last > s.first ? last : s.first; t < end; ++t) out[t * a.tests] = R{0};
  if (a.lags == 1) {
    // alpha of the step after t, times its lam.
    const bool more = last == end && end < length;
    R later = more ? out[end * a.tests] : R{0};
    R alpha_later = more ? sums[(end - s.first) * a.tests] : R{0};
    for (int64_t t = last - 1; t >= s.first; t -= kStepsAhead) {
      R alpha[kStepsAhead], up[kStepsAhead];
#pragma unroll
      for (int k = 0; k < kStepsAhead; ++k) {
        const bool there = t - k >= s.first;
        alpha[k] = there ? sums[(t - k - s.first) * a.tests] : R{0};
        up[k] = there ? grad(run, t - k, q) : R{0};
      }
#pragma unroll
      for (int k = 0; k < kStepsAhead; ++k) {
        if (t - k < s.first) continue;
        later = fused(alpha_later, later, up[k]);
        alpha_later = alpha[k];
        out[(t - k) * a.tests] = later;
      }
    }
    return;
  }
  for (int64_t t = last - 1; t >= s.first; --t) {
    R now = grad(run, t, q);
    for (int64_t j = 1; j <= a.lags && t + j < length; ++j)
      now =
          fused(sums[(j - 1) * states + (t + j - s.first) * a.tests], out[(t + j) * a.tests], now);
    out[t * a.tests] = now;
  }
}

// Gradients of y at steps [first, T), of which those below 0 are y0, from those of the predictions
// (in a scan lam). A thread per (run, step, test example).
template <class T>
static __global__ void __launch_bounds__(kFlatThreads, 4)
    past_kernel(MarkovArgs<T> a, Upstream<Real<T>> grad, int64_t first, int64_t count,
                Real<T>* grad_y, Real<T>* grad_y0) {
  using R = Real<T>;
  const int64_t i = flat_index();
  if (i >= a.runs * count * a.tests) return;
  const Split at = split(i, a.tests), step = split(at.whole, count);
  const int64_t run = step.whole, at_step = first + step.rest, q = at.rest;
  R* const to = at_step >= 0         ? grad_y + (run * a.steps + at_step) * a.tests + q
                : grad_y0 != nullptr ? grad_y0 + (run * a.lags + a.lags + at_step) * a.tests + q
                                     : nullptr;
  if (to == nullptr) return;
  R sum{0};
  const int64_t length = a.length(run);
  for (int64_t j = 1; j <= a.lags && a.known(run, at_step, q); ++j) {
    const int64_t t = at_step + j, batch = run * a.steps + t;
    if (t < 0 || t >= length || !a.usable(run, t, q)) continue;
    const R alpha = a.factor(j - 1, batch, q, a.order.template weight<R>(batch));
    sum = fused(alpha, grad(run, t, q), sum);
  }
  *to = sum;
}

// What the entries of order say of the factors, for scatter_kernel.
template <class T>
struct MarkovSource {
  MarkovArgs<T> a;
  Upstream<Real<T>> grad;  // in a scan lam

  __device__ int64_t id(int64_t entry) const {
    if (a.lengths.given()) {
      const Split step = split(split(entry, a.order.size).whole, a.steps);
      if (step.rest >= a.length(step.whole)) return -1;
    }
    return a.order.id(entry);
  }
  __device__ Real<T> value(int64_t entry, int64_t plane, int64_t q) const {
    const int64_t batch = split(entry, a.order.size).whole;
    const Split step = split(batch, a.steps);
    const int64_t run = step.whole, t = step.rest;
    if (!a.usable(run, t, q)) return Real<T>{0};
    Real<T> x = grad(run, t, q);
    if (a.order.mean) x *= a.order.template weight<Real<T>>(batch);
    return plane < a.lags ? x * a.past(run, t - 1 - plane, q) : x;
  }
};

// -- launches
// --------------------------------------------------------------------------------------

// Numbers of a stretch: what the second cache holds beside what is read.
constexpr int64_t kStretch = int64_t{4} << 20;

// Steps of a stretch of `planes` planes, besides `beyond` more.
template <class T>
int64_t stretch_steps(const MarkovArgs<T>& a, int64_t planes, int64_t beyond, int64_t numbers) {
  const int64_t step = planes * a.runs * a.tests;
  const int64_t fit = numbers / (step > 0 ? step : 1) - beyond;
  return fit < 1 ? 1 : fit < a.steps ? fit : a.steps;
}

template <class T>
ScatterShape scatter_shape(const MarkovArgs<T>& a) {
  return {a.lags + 1, a.order.rows, a.tests, a.runs * a.steps * a.order.size};
}

template <class T>
void launch_factors(const MarkovArgs<T>& a, int64_t planes, const Stretch<Real<T>>& s,
                    cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(flat_blocks(a.runs * s.count * a.tests));
  TENFOLD_LAUNCH(factors_kernel<T>, blocks, kFlatThreads, stream, a, planes, s);
}

template <class T>
unsigned scan_blocks(const MarkovArgs<T>& a) {
  return static_cast<unsigned>((a.runs * a.tests + kLaneThreads - 1) / kLaneThreads);
}

// The most blocks of a launch of the family for these arguments.
template <class T>
int64_t markov_blocks(const MarkovArgs<T>& a) {
  const int64_t flat = flat_blocks(a.runs * (a.steps + a.lags) * a.tests);
  const int64_t scatter = scatter_blocks<T>(scatter_shape(a));
  return flat > scatter ? flat : scatter;
}

template <class T>
void launch_onestep(const MarkovArgs<T>& a, Real<T>* out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(flat_blocks(a.runs * a.steps * a.tests));
  if (blocks > 0) TENFOLD_LAUNCH(onestep_kernel<T>, blocks, kFlatThreads, stream, a, out);
}

// a.y is set to y, contiguous.
template <class T>
void launch_scan(MarkovArgs<T> a, Real<T>* y, const Room& room, cudaStream_t stream,
                 int64_t stretch = kStretch) {
  a.y = y, a.y_run = a.steps * a.tests, a.y_step = a.tests;
  if (a.runs * a.steps * a.tests == 0) return;
  const int64_t planes = a.lags + 1, most = stretch_steps(a, planes, 0, stretch);
  const int64_t bytes = planes * a.runs * most * a.tests * static_cast<int64_t>(sizeof(Real<T>));
  auto* const sums = static_cast<Real<T>*>(room(bytes));
  for (int64_t first = 0; first < a.steps; first += most) {
    const Stretch<Real<T>> s{first, a.steps - first < most ? a.steps - first : most, sums};
    launch_factors(a, planes, s, stream);
    TENFOLD_LAUNCH(scan_steps_kernel<T>, scan_blocks(a), kLaneThreads, stream, a, s, y);
  }
}

// Gradients of what comes before the steps. grad_y null: of y0 only.
template <class T>
void launch_past(const MarkovArgs<T>& a, const Upstream<Real<T>>& grad, Real<T>* grad_y,
                 Real<T>* grad_y0, cudaStream_t stream) {
  const int64_t count = a.lags + (grad_y != nullptr ? a.steps : 0);
  const auto blocks = static_cast<unsigned>(flat_blocks(a.runs * count * a.tests));
  if (blocks > 0)
    TENFOLD_LAUNCH(past_kernel<T>, blocks, kFlatThreads, stream, a, grad, -a.lags, count, grad_y,
                   grad_y0);
}

template <class T>
void launch_factor_gradient(const MarkovArgs<T>& a, const Upstream<Real<T>>& grad, T* out,
                            cudaStream_t stream) {
  launch_scatter<T>(MarkovSource<T>{a, grad}, scatter_shape(a), out, stream);
}

template <class T>
void launch_scan_backward(const MarkovArgs<T>& a, const Upstream<Real<T>>& grad, T* grad_factors,
                          Real<T>* grad_y0, const Room& room, cudaStream_t stream,
                          int64_t stretch = kStretch) {
  constexpr int64_t kSize = sizeof(Real<T>);
  const int64_t states = a.runs * a.steps * a.tests;
  auto* const lam = static_cast<Real<T>*>(room(states * kSize));
  if (states > 0) {
    const int64_t most = stretch_steps(a, a.lags, a.lags, stretch);
    const int64_t longest = most + a.lags < a.steps ? most + a.lags : a.steps;
    auto* const sums = static_cast<Real<T>*>(room(a.lags * a.runs * longest * a.tests * kSize));
    for (int64_t end = a.steps; end > 0; end -= most) {
      const int64_t first = end > most ? end - most : 0;
      const int64_t reach = end + a.lags < a.steps ? end + a.lags : a.steps;
      const Stretch<Real<T>> s{first, reach - first, sums};
      launch_factors(a, a.lags, s, stream);
      TENFOLD_LAUNCH(scan_back_kernel<T>, scan_blocks(a), kLaneThreads, stream, a, s, end, grad,
                     lam);
    }
  }
  const Upstream<Real<T>> all{lam, a.steps * a.tests, a.tests};
  launch_past(a, all, static_cast<Real<T>*>(nullptr), grad_y0, stream);
  launch_factor_gradient(a, all, grad_factors, stream);
}

}  // namespace tenfold::cuda
