// Macro values, rewards and advantages (MA-RLHF sections 3.2, 3.4 to 3.6). One row at a time, with
// tokens scattered to their segments, so that any `seg` is safe: tokens whose segment is not in
// [0, T) count as masked, and what they hold is never read.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace tenfold {

enum class PoolBy : int { sum, equal, unit, position, position_early };
enum class KlBy : int { k1, k2, k3 };

// Weight of the token at `place` of a segment of `length` tokens; `harmonic`: 1 + ... + 1 / length.
TENFOLD_HD double pool_weight(PoolBy by, int64_t place, int64_t length, double harmonic) {
  switch (by) {
    case PoolBy::sum: return 1.0;
    case PoolBy::equal: return 1.0 / static_cast<double>(length);
    case PoolBy::unit: return place == length - 1 ? 1.0 : 0.0;
    case PoolBy::position: return 1.0 / (static_cast<double>(length - place) * harmonic);
    default: return 1.0 / (static_cast<double>(place + 1) * harmonic);
  }
}

TENFOLD_HD double kl_term(KlBy by, double k) {
  return by == KlBy::k1 ? k : by == KlBy::k2 ? 0.5 * k * k : std::expm1(-k) + k;
}

struct GaeParams {
  double gamma, lam;
  bool per_token;  // discount by gamma to the length of the macro action
};

// In place: adv holds rewards and ret values of `n` macro actions on entry.
template <class T>
TENFOLD_HD void gae_row(const GaeParams& p, int64_t n, double bootstrap, const int32_t* length,
                        T* adv, T* ret) {
  double later = bootstrap, carry = 0.0;
  for (int64_t t = n - 1; t >= 0; --t) {
    const double g = p.per_token ? std::pow(p.gamma, static_cast<double>(length[t])) : p.gamma;
    const double value = ret[t];
    carry = static_cast<double>(adv[t]) + g * later - value + g * p.lam * carry;
    adv[t] = static_cast<T>(carry);
    ret[t] = static_cast<T>(carry + value);
    later = value;
  }
}

}  // namespace tenfold
