// SPDX-License-Identifier: Apache-2.0
// Macro values, rewards and advantages (MA-RLHF sections 3.2, 3.4 to 3.6), a row at a time. Any
// `seg` is memory-safe: a token whose segment is outside [0, width of its row) counts as masked,
// and what it holds is never read. Where the tokens of a segment do not follow one another (masked
// ones between them aside), the results of its row are unspecified.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "rl/rows.h"

namespace tenfold {

enum class PoolBy : int { sum, equal, unit, position, position_early };
enum class KlBy : int { k1, k2, k3 };

// 1 + 1/2 + ... + 1/n; the series beyond 32 is exact to the last digits.
TENFOLD_HD double harmonic(int64_t n) {
  if (n < 32) {
    double sum = 0.0;
    for (int64_t i = 1; i <= n; ++i) sum += 1.0 / static_cast<double>(i);
    return sum;
  }
  const double x = static_cast<double>(n), y = 1.0 / (x * x);
  return std::log(x) + 0.57721566490153286 + 0.5 / x -
         y * (1.0 / 12.0 - y * (1.0 / 120.0 - y * (1.0 / 252.0)));
}

// Weights of tokens: the share of the one at `place` of `length`, times the norm of its segment.
TENFOLD_HD double pool_share(PoolBy by, int64_t place, int64_t length) {
  if (by == PoolBy::unit) return place == length - 1 ? 1.0 : 0.0;
  if (by == PoolBy::position) return 1.0 / static_cast<double>(length - place);
  return by == PoolBy::position_early ? 1.0 / static_cast<double>(place + 1) : 1.0;
}

TENFOLD_HD double pool_norm(PoolBy by, int64_t length) {
  if (by == PoolBy::equal) return 1.0 / static_cast<double>(length);
  return by == PoolBy::position || by == PoolBy::position_early ? 1.0 / harmonic(length) : 1.0;
}

TENFOLD_HD double kl_term(KlBy by, double k) {
  return by == KlBy::k1 ? k : by == KlBy::k2 ? 0.5 * k * k : std::expm1(-k) + k;
}

struct GaeRule {
  double gamma, lam;
  bool per_token;  // discount by gamma to the length of the macro action
};

template <class T>
struct PoolParams {
  SegmentRows seg;
  int64_t count;  // T; seg.most is the same
  PoolBy by;
  const T* x;  // forward: as seg; backward: [rows, count]
  T* out;      // the other one of these
};

// Of macro actions: [rows, width], the first nseg of a row. Of tokens: those of a mask.
template <class T>
struct GaeParams {
  Rows rows;
  bool masked;
  Ints nseg;
  const uint8_t* mask;
  const T *value, *reward, *bootstrap;  // bootstrap, length: null if there are none
  const int32_t* length;
  GaeRule rule;
  T *adv, *ret;
};

struct PrepareRule {
  double beta, score_clip;
  PoolBy sigma;
  bool reduce_sigma;  // rewards are pooled like values, the score before that
  KlBy kl;
  GaeRule gae;
};

template <class T>
struct PrepareParams {
  SegmentRows seg;
  Ints nseg;
  const T *old, *ref, *value, *score, *bootstrap;
  PrepareRule rule;
  T *adv, *ret, *adv_m, *ret_m, *kl_row;
};

// Whether every row of `seg` numbers its macro actions 0, 1, ... in order, each with a token.
struct CheckParams {
  Rows rows;
  Ints seg, nseg;  // nseg.data null: any number
  int64_t limit;   // of segments of a row
  uint8_t* wrong;  // [rows]
};

}  // namespace tenfold
