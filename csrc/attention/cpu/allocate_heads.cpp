// SPDX-License-Identifier: Apache-2.0
// CPU allocate_heads (DHA section 3.4): the exact knapsack. A component (layer, key or value) takes
// one of K sizes n_k at a cost; the sum of costs is least under sum n <= budget.
//
//   least[c][s] = min over k of least[c - 1][s - n_k] + cost[c][k],  s = heads spent
//
// Equal costs: the most heads in all, then the earlier size of the later components. O(C K budget).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/heads_ops.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

constexpr double kNone = std::numeric_limits<double>::infinity();
constexpr int64_t kMaxCells = int64_t{1} << 31;

template <class T>
std::vector<double> read_costs(const Tensor& cost) {
  std::vector<double> out;
  for (int64_t c = 0; c < cost.sizes()[0]; ++c)
    for (int64_t k = 0; k < cost.sizes()[1]; ++k) {
      const double x = data_as<T>(cost)[c * cost.strides()[0] + k * cost.strides()[1]];
      TENFOLD_CHECK_VALUE(!std::isnan(x) && x > -kNone,
                          "tenfold::allocate_heads: cost must be a number, or +inf for a size that "
                          "is not allowed, got ",
                          x, " at [", c, ", ", k, "]");
      out.push_back(x);
    }
  return out;
}

struct Problem {
  int64_t components, options, budget;
  std::vector<double> cost;    // [components][options]
  std::vector<int64_t> sizes;  // the same
};

// Smallest and largest number of heads that allowed sizes give.
std::pair<int64_t, int64_t> range_of(const Problem& p) {
  int64_t low = 0, high = 0;
  for (int64_t c = 0; c < p.components; ++c) {
    int64_t least = std::numeric_limits<int64_t>::max(), most = 0;
    for (int64_t at = c * p.options; at < (c + 1) * p.options; ++at) {
      TENFOLD_CHECK_VALUE(p.sizes[at] >= 1 && p.sizes[at] <= 1 << 20,
                          "tenfold::allocate_heads: sizes must be in [1, 2^20], got ", p.sizes[at],
                          " for component ", c);
      if (p.cost[at] == kNone) continue;
      least = std::min(least, p.sizes[at]);
      most = std::max(most, p.sizes[at]);
    }
    TENFOLD_CHECK_VALUE(most > 0, "tenfold::allocate_heads: component ", c,
                        " has no size of finite cost");
    low += least;
    high += most;
  }
  return {low, high};
}

// Which option each component takes.
std::vector<int64_t> solve(const Problem& p) {
  const int64_t width = p.budget + 1;
  std::vector<double> least(width, kNone), next(width);
  least[0] = 0.0;
  std::vector<int16_t> choice(p.components * width, -1);
  for (int64_t c = 0; c < p.components; ++c) {
    std::fill(next.begin(), next.end(), kNone);
    int16_t* chosen = choice.data() + c * width;
    for (int64_t k = 0; k < p.options; ++k) {
      const int64_t n = p.sizes[c * p.options + k];
      const double cost = p.cost[c * p.options + k];
      for (int64_t spent = 0; spent + n <= p.budget; ++spent) {
        const double total = least[spent] + cost;
        if (total < next[spent + n]) {
          next[spent + n] = total;
          chosen[spent + n] = static_cast<int16_t>(k);
        }
      }
    }
    std::swap(least, next);
  }
  int64_t spent = 0;
  for (int64_t s = 0; s < width; ++s)
    if (least[s] <= least[spent]) spent = s;
  std::vector<int64_t> taken(p.components);
  for (int64_t c = p.components - 1; c >= 0; --c) {
    taken[c] = choice[c * width + spent];
    spent -= p.sizes[c * p.options + taken[c]];
  }
  return taken;
}

Tensor allocate_heads_op(Tensor cost, Tensor sizes, int64_t budget) {
  check_allocate_heads("allocate_heads", cost, sizes, budget);
  Problem p{cost.sizes()[0], cost.sizes()[1], budget, {}, read_ints<int64_t>(sizes)};
  p.cost =
      cost.scalar_type() == ScalarType::Double ? read_costs<double>(cost) : read_costs<float>(cost);
  if (sizes.dim() == 1 && p.components > 0) {
    const auto one = p.sizes;
    for (int64_t c = 1; c < p.components; ++c)
      p.sizes.insert(p.sizes.end(), one.begin(), one.end());
  }
  const auto [low, high] = range_of(p);
  TENFOLD_CHECK_VALUE(budget >= low, "tenfold::allocate_heads: budget must be at least ", low,
                      " heads (all of them: ", high, "), got ", budget);
  p.budget = std::min(budget, high);
  TENFOLD_CHECK_VALUE(p.components * (p.budget + 1) <= kMaxCells,
                      "tenfold::allocate_heads: C * budget must be at most 2^31, got ",
                      p.components, " * ", p.budget);
  const auto taken = solve(p);
  const Tensor out = new_output(cost, {p.components}, ScalarType::Int);
  for (int64_t c = 0; c < p.components; ++c)
    data_as<int32_t>(out)[c] = static_cast<int32_t>(p.sizes[c * p.options + taken[c]]);
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("allocate_heads", TORCH_BOX(&tenfold::cpu::allocate_heads_op));
}
