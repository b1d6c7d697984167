// SPDX-License-Identifier: Apache-2.0
// Half and double rate by a fixed filter (ERNIE-Music section 3.4), each row of a signal by itself:
//
//   down  y[j] = sum_k h[k] x[2 j + k - 3], k = 0 .. 7, three reflected samples at both ends
//   up    y[n] = sum_i 2 h[n + 7 - 2 i] x[i - 2], two reflected samples at both ends
//   and the adjoints of both, which are each other's sums but for the ends and the factor 2
//
// h is symmetric: taps t[0] t[1] t[2] t[3] t[3] t[2] t[1] t[0], which sum to 1. Traffic: each input
// read once, each output written once; what `up` writes may be the first channels of a wider
// tensor.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

constexpr float kFir0 = -0.01171875f, kFir1 = -0.03515625f, kFir2 = 0.11328125f,
                kFir3 = 0.43359375f;

enum class Fir : int { down, up, down_grad, up_grad };

// Lengths of a row.
constexpr int64_t fir_least(Fir kind) {
  return kind == Fir::down || kind == Fir::down_grad ? 4 : 3;
}

TENFOLD_HD int64_t fir_reflect(int64_t i, int64_t length) {
  return i < 0 ? -i : i < length ? i : 2 * (length - 1) - i;
}

TENFOLD_HD float fir_tap(int64_t k) {
  const int64_t i = k < 4 ? k : 7 - k;
  return i < 2 ? (i == 0 ? kFir0 : kFir1) : i == 2 ? kFir2 : kFir3;
}

// Output i of a row, wherever it lies; get(j) gives x[j] as Real. `length`: of the signal at the
// side that has not been resampled (the input of the op, or of the op whose gradient this is).
template <class Real, class Get>
TENFOLD_HD Real fir_at(Fir kind, int64_t i, int64_t length, const Get& get) {
  Real sum = 0;
  if (kind == Fir::down) {
    for (int64_t k = 0; k < 8; ++k)
      sum += Real(fir_tap(k)) * get(fir_reflect(2 * i + k - 3, length));
    return sum;
  }
  if (kind == Fir::up) {
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t at = (i + 1) / 2 + k;  // of the padded row
      sum += Real(2 * fir_tap(i + 7 - 2 * at)) * get(fir_reflect(at - 2, length));
    }
    return sum;
  }
  // What padded position m gave goes to the sample that it was a copy of.
  const int64_t pad = kind == Fir::down_grad ? 3 : 2;
  for (int copy = 0; copy < 3; ++copy) {  // itself, its image at the left, and at the right
    const int64_t m = copy == 0 ? i + pad : copy == 1 ? pad - i : 2 * (length - 1) - i + pad;
    const bool is_end = (copy == 1 && i == 0) || (copy == 2 && i == length - 1);
    if (m < 0 || m >= length + 2 * pad || is_end) continue;
    if (kind == Fir::down_grad) {  // j with 0 <= m - 2 j <= 7
      for (int64_t j = m < 7 ? 0 : (m - 6) / 2; j <= m / 2 && j < length / 2; ++j)
        sum += Real(fir_tap(m - 2 * j)) * get(j);
    } else {  // n with 0 <= n + 7 - 2 m <= 7
      for (int64_t n = 2 * m < 7 ? 0 : 2 * m - 7; n <= 2 * m && n < 2 * length; ++n)
        sum += Real(2 * fir_tap(n + 7 - 2 * m)) * get(n);
    }
  }
  return sum;
}

// Rows [B, C] of a tensor, in elements.
struct FirRows {
  void* data;
  int64_t batch_step, row_step;
};

struct FirSpan {
  Dtype dtype;
  Fir kind;
  bool past_caches;
  const void* x;       // a row
  void* y;             // a row
  int64_t length;      // as of fir_at
  int64_t begin, end;  // outputs
};

TENFOLD_ISA_DECLARE_BF16(void fir_row(const FirSpan& s))
// As it is, bit for bit.
TENFOLD_ISA_DECLARE_BF16(void copy_row(const void* from, void* to, int64_t bytes, bool past_caches))

}  // namespace tenfold
