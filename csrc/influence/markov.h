// SPDX-License-Identifier: Apache-2.0
// markov_scan and markov_onestep (GPTfluence, sections 3.1, 3.4 and 6): a metric y of Q test
// examples over the T steps of R training runs, as a recurrence of order n whose factors are sums
// over the batch of a step,
//
//   y[r, t, q] = sum over j = 1..n of alpha_j y[r, t - j, q] + beta
//   alpha_j    = sum over b of factors[j - 1, order[r, t, b], q]   (alpha_1: 1 more if residual)
//   beta       = sum over b of factors[n, order[r, t, b], q]
//
// factors [n + 1, M, Q] float32 or bfloat16 (float64, for tests), order [R, T, B] with -1 where
// there is none, y float32 (float64). Before step 0 y is y0 [R, n, Q], the oldest first. The scan
// goes on from what it has made; one step uses what was recorded. Sums may be means.
//
// Lanes (r, q) do not depend on each other, so whoever owns some of them can do all of their steps.
// Backward, with a step's lam = its gradient (in a scan: + sum over j of alpha_j,t+j lam_t+j):
//
//   grad_factors[j - 1, i, q] = sum over r, t, and b with order[r, t, b] = i, of lam y[r, t - j, q]
//   grad_factors[n, i, q]     = the same of lam
//   grad_y[r, s, q]           = sum over j of alpha_j,s+j lam_s+j   (s < 0: of y0)
//
// An owner of some q adds these up by itself: no atomics, and one result for all numbers of
// threads. On the CPU it takes the steps in stretches, the last one first: what every step of one
// adds to the gradients of its batch, then for each training example the sum over its steps in
// registers. Memory beside the results: O(M n) for each owner's lanes, and four numbers for each
// entry of order.
// Traffic: n + 1 rows for each entry of order, from the cache that holds the owner's.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

// What is computed in.
template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

// Of a block of lanes q, in elements; pointers are to its first one.
template <class T>
struct MarkovSteps {
  const T* factors;
  int64_t plane, row;  // from plane to plane, and from training example to training example
  int64_t lags;        // n
  const int32_t* ids;  // order, contiguous
  int64_t steps, batch, tests;
  const int64_t* lengths;  // steps of each run; null: all
  bool residual, mean;
  bool free_running;  // a scan: y is what it has made
  const Real<T>* y;
  int64_t y_run, y_step;
  const Real<T>* y0;  // null: zeros
  int64_t y0_run, y0_lag;
  const uint8_t* mask;  // null: all of y was recorded
  int64_t mask_run, mask_step;
};

template <class T>
struct MarkovForward {
  MarkovSteps<T> s;
  Real<T>* out;  // [R, T, Q]; in a scan the same as s.y
};

// Steps [begin, end) of all runs, one run after the other, and which of them each training example
// was in: `rows[k]`, ascending, in the steps `places[ends[k - 1], ends[k])`, counted from begin.
struct MarkovStretch {
  int64_t begin, end, count;
  const int32_t *rows, *ends, *places;
};

template <class T>
struct MarkovBackward {
  MarkovSteps<T> s;
  const Real<T>* grad;
  int64_t grad_run, grad_step;
  // Gradients of factors: the result itself, if there is one stretch of all training examples; or
  // null, and sums over stretches, zeros at first.
  T* out;
  Real<T>* sums;
  int64_t out_plane, out_row;  // of either
  Real<T>* grad_y;             // [R, T, Q]; null in a scan, or if nobody asks
  Real<T>* grad_y0;            // [R, n, Q] or null
  Real<T>* ring;               // n rows of kMarkovLanes, kept from stretch to stretch
  Real<T>* shares;             // room for n + 1 planes of `shares_row` for each step of a stretch
  int64_t shares_plane, shares_row;
};

// The most lanes of a block.
constexpr int64_t kMarkovLanes = 64;

#define TENFOLD_MARKOV_DECLARE(T)                                                                \
  TENFOLD_ISA_DECLARE(                                                                           \
      void markov_forward(const MarkovForward<T>& p, int64_t begin, int64_t end, int64_t lanes)) \
  TENFOLD_ISA_DECLARE(                                                                           \
      void markov_backward(const MarkovBackward<T>& p, const MarkovStretch& of, int64_t lanes))
// Runs [begin, end), or a stretch, of `lanes` lanes.
TENFOLD_MARKOV_DECLARE(float)
TENFOLD_MARKOV_DECLARE(bf16_t)
TENFOLD_MARKOV_DECLARE(double)
#undef TENFOLD_MARKOV_DECLARE

// n floats, rounded.
TENFOLD_ISA_DECLARE(void round_row(const float* from, int64_t n, bf16_t* to))

}  // namespace tenfold
