// SPDX-License-Identifier: Apache-2.0
// Device code of markov_onestep_tuples (influence/tuples.h): a warp a tuple; backward, sums by
// scatter_kernel.cuh over the entries of batches (of H), and over tuples (of G).
#pragma once

#include <cmath>

#include "influence/cuda/scatter_kernel.cuh"

namespace tenfold::cuda {

template <class T>
struct TupleArgs {
  const T *h, *g;
  int64_t h_plane, h_row, g_plane, g_row;
  Batches order;
  IntArray tests;
  int64_t lags, num_tests, dim, count;
  const Real<T>* hist;
  int64_t hist_row;
  bool residual;

  // Row of the tuple's test example; -1: there is none.
  __device__ int64_t test(int64_t k) const {
    const int64_t q = tests[k];
    return q >= 0 && q < num_tests ? q : -1;
  }
  __device__ Real<T> past(int64_t k, int64_t plane) const {
    return hist[k * hist_row + lags - 1 - plane];
  }
  // Column e of the sum over the batch.
  __device__ Real<T> batch_sum(int64_t k, int64_t plane, int64_t e) const {
    return order.sum(k, h + plane * h_plane + e, h_row);
  }
  __device__ Real<T> of_test(int64_t q, int64_t plane, int64_t e) const {
    return widen(g[plane * g_plane + q * g_row + e]);
  }
  // What a tuple's gradient counts for a plane.
  __device__ Real<T> share(const Real<T>* grad, int64_t k, int64_t plane) const {
    Real<T> c = grad[k];
    if (plane < lags) c *= past(k, plane);
    return order.mean ? c * order.template weight<Real<T>>(k) : c;
  }
};

constexpr int kTupleThreads = 128, kTupleWarps = kTupleThreads / 32;

// pred [N], or with upstream gradients [N] those of hist [N, n].
template <class T>
static __global__ void __launch_bounds__(kTupleThreads)
    tuples_kernel(TupleArgs<T> a, const Real<T>* grad, Real<T>* out) {
  using R = Real<T>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kTupleWarps + threadIdx.x / 32;
  if (k >= a.count) return;
  const int64_t q = a.test(k);
  const R weight = a.order.template weight<R>(k);
  R y{0};
  for (int64_t plane = a.lags; plane >= 0; --plane) {
    if (grad != nullptr && plane == a.lags) continue;
    R factor{0};
    for (int64_t e = lane; q >= 0 && e < a.dim; e += 32)
      factor = fused(a.batch_sum(k, plane, e), a.of_test(q, plane, e), factor);
    for (int step = 16; step > 0; step /= 2) factor += __shfl_xor_sync(0xFFFFFFFFu, factor, step);
    if (a.order.mean) factor *= weight;
    if (plane == 0 && a.residual) factor += R{1};
    if (grad != nullptr) {
      if (lane == 0) out[k * a.lags + a.lags - 1 - plane] = q >= 0 ? grad[k] * factor : R{0};
      continue;
    }
    y = plane == a.lags ? factor : fused(factor, a.past(k, plane), y);
  }
  if (lane == 0 && grad == nullptr) out[k] = q >= 0 ? y : static_cast<R>(NAN);
}

template <class T>
struct BatchSource {  // of H: entries [N, B]
  TupleArgs<T> a;
  const Real<T>* grad;

  __device__ int64_t id(int64_t entry) const {
    return a.test(split(entry, a.order.size).whole) >= 0 ? a.order.id(entry) : -1;
  }
  __device__ Real<T> value(int64_t entry, int64_t plane, int64_t e) const {
    const int64_t k = split(entry, a.order.size).whole;
    return a.share(grad, k, plane) * a.of_test(a.test(k), plane, e);
  }
};

template <class T>
struct TestSource {  // of G: entries [N]
  TupleArgs<T> a;
  const Real<T>* grad;

  __device__ int64_t id(int64_t k) const { return a.test(k); }
  __device__ Real<T> value(int64_t k, int64_t plane, int64_t e) const {
    return a.share(grad, k, plane) * a.batch_sum(k, plane, e);
  }
};

template <class T>
ScatterShape h_shape(const TupleArgs<T>& a) {
  return {a.lags + 1, a.order.rows, a.dim, a.count * a.order.size};
}
template <class T>
ScatterShape g_shape(const TupleArgs<T>& a) {
  return {a.lags + 1, a.num_tests, a.dim, a.count};
}

// The most blocks of a launch for these arguments.
template <class T>
int64_t tuple_blocks(const TupleArgs<T>& a) {
  const int64_t of_h = scatter_blocks<T>(h_shape(a)), of_g = scatter_blocks<T>(g_shape(a));
  const int64_t tuples = (a.count + kTupleWarps - 1) / kTupleWarps;
  const int64_t most = of_h > of_g ? of_h : of_g;
  return most > tuples ? most : tuples;
}

template <class T>
void launch_tuples(const TupleArgs<T>& a, const Real<T>* grad, Real<T>* out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((a.count + kTupleWarps - 1) / kTupleWarps);
  if (blocks > 0) TENFOLD_LAUNCH(tuples_kernel<T>, blocks, kTupleThreads, stream, a, grad, out);
}

// Null: not wanted.
template <class T>
void launch_tuples_backward(const TupleArgs<T>& a, const Real<T>* grad, T* grad_h, T* grad_g,
                            Real<T>* grad_hist, cudaStream_t stream) {
  if (grad_hist != nullptr) launch_tuples(a, grad, grad_hist, stream);
  if (grad_h != nullptr) launch_scatter<T>(BatchSource<T>{a, grad}, h_shape(a), grad_h, stream);
  if (grad_g != nullptr) launch_scatter<T>(TestSource<T>{a, grad}, g_shape(a), grad_g, stream);
}

}  // namespace tenfold::cuda
