// SPDX-License-Identifier: Apache-2.0
// The weights of slerp_merge's two ends (Shoemake, SIGGRAPH 1985), from the Gram matrix
// [[g00, g01], [g01, g11]] of what is interpolated.
#pragma once

#include <cmath>

#include "core/macros.h"

namespace tenfold {

struct SlerpWeights {
  double first, second;
};

// t, and whether the ends are so nearly parallel that they are interpolated along a straight line.
struct SlerpRule {
  double t, dot_threshold;

  TENFOLD_HD_MEMBER SlerpWeights weights(double g00, double g01, double g11) const {
    constexpr double kTiny = 1e-8;  // norms below it have no direction
    const double n0 = std::sqrt(g00), n1 = std::sqrt(g11);
    const double cosine = n0 > kTiny && n1 > kTiny ? g01 / (n0 * n1) : 0.0;
    const bool parallel = !(std::abs(cosine) <= dot_threshold);
    if (parallel || t == 0.0 || t == 1.0) return {1.0 - t, t};
    const double angle = std::acos(cosine), sine = std::sin(angle);
    return {std::sin((1.0 - t) * angle) / sine, std::sin(t * angle) / sine};
  }
};

}  // namespace tenfold
