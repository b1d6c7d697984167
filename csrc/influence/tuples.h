// SPDX-License-Identifier: Apache-2.0
// markov_onestep_tuples (GPTfluence, sections 3.3 and 6): one step of one run for one test example,
// N times, from features instead of factors,
//
//   pred[k]   = sum over j = 1..n of alpha_j hist[k, n - j] + beta
//   alpha_j   = <S_j-1[k], G[j - 1, q]>, beta = <S_n[k], G[n, q]>   (alpha_1: 1 more if residual)
//   S_p[k, :] = sum (or mean) over b of H[p, order_rows[k, b], :],  q = test_rows[k]
//
// H [n + 1, M, E], G [n + 1, Q, E], hist [N, n], the oldest first. Backward, with c_p = grad[k]
// times hist[k, n - 1 - p] (1 for p = n):
//
//   grad_G[p, q, :] += c_p S_p[k, :],  grad_H[p, i, :] += c_p G[p, q, :] for each i of the batch
//   grad_hist[k, n - j] = grad[k] alpha_j
//
// A task owns some columns of a plane and takes the tuples in their order: no atomics. The rows
// that a batch chooses are summed before they are multiplied, and nothing of the size N B E is
// made: traffic is (n + 1) (B + 1) rows of E a tuple.
#pragma once

#include "influence/markov.h"

namespace tenfold {

template <class T>
struct TupleSteps {
  const T *h, *g;
  int64_t h_plane, h_row, g_plane, g_row;  // in elements
  int64_t lags, dim, batch;
  const int32_t *ids, *tests;
  const Real<T>* hist;
  int64_t hist_row;
  bool residual, mean;
};

template <class T>
struct TupleForward {
  TupleSteps<T> s;
  // Either the predictions [N], or with upstream gradients [N] those of hist [N, n].
  Real<T>* pred;
  const Real<T>* grad;
  Real<T>* grad_hist;
};

// Columns [at, at + lanes) of a plane. Sums of rows `h_stride` and `g_stride` apart, zeros at
// first, pointers to the column `at`; null: not wanted.
template <class T>
struct TupleBackward {
  TupleSteps<T> s;
  int64_t count, plane, at, lanes;
  const Real<T>* grad;
  Real<T>*h_sums, *g_sums;
  int64_t h_stride, g_stride;
};

#define TENFOLD_TUPLES_DECLARE(T)                                                                \
  TENFOLD_ISA_DECLARE(void tuples_forward(const TupleForward<T>& p, int64_t begin, int64_t end)) \
  TENFOLD_ISA_DECLARE(void tuples_backward(const TupleBackward<T>& p))
TENFOLD_TUPLES_DECLARE(float)
TENFOLD_TUPLES_DECLARE(bf16_t)
TENFOLD_TUPLES_DECLARE(double)
#undef TENFOLD_TUPLES_DECLARE

}  // namespace tenfold
