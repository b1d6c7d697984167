// SPDX-License-Identifier: Apache-2.0
// What constant input channels add to a convolution with zero padding (ERNIE-Music section 6). With
// taps T[b, o, k] = sum_i weight[o, i, k] c[b, i] of the planes, K odd, p = K / 2:
//
//   planes_add_  y[b, o, l] += bias[o] + sum_k T[b, o, k] [0 <= l + k - p < L]
//   planes_sums  S[b, o, k] = sum_l g[b, o, l] [0 <= l + k - p < L], its adjoint
//
// All but p positions at both ends take every tap: one number for a row. Traffic: y read and
// written once, or at the ends only where the row's number is in it already; g read once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

// Sum of the taps that position l takes.
template <class Real>
TENFOLD_HD Real planes_at(const Real* taps, int64_t size, int64_t l, int64_t length) {
  const int64_t pad = size / 2, first = l < pad ? pad - l : 0;
  const int64_t room = length + pad - l, end = room < size ? room : size;
  Real sum = 0;
  for (int64_t k = first; k < end; ++k) sum += taps[k];
  return sum;
}

// Whether position l takes all of them.
TENFOLD_HD bool planes_whole(int64_t size, int64_t l, int64_t length) {
  return l >= size / 2 && l < length - size / 2;
}

TENFOLD_ISA_DECLARE_BF16(void add_number(Dtype dtype, void* row, int64_t n, float number))
// Of a block of neighbours.
TENFOLD_ISA_DECLARE_BF16(double sum_numbers(Dtype dtype, const void* row, int64_t n))

}  // namespace tenfold
