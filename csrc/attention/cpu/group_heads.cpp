// SPDX-License-Identifier: Apache-2.0
// CPU group_heads: plain C++, deterministic for a seed (Philox counters are (draw, run)).
#include "attention/group_heads.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "attention/heads_ops.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

constexpr double kStart = 100.0, kEnd = 0.001, kFactor = 0.9;  // temperatures of the paper

class Random {
 public:
  Random(int64_t seed, int64_t run)
      : lo_(static_cast<uint32_t>(seed)),
        hi_(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        run_(static_cast<uint32_t>(run)) {}
  uint32_t word() { return philox4x32_10(draw_++, run_, 0, 0, lo_, hi_).word[0]; }
  int64_t below(int64_t n) {
    return static_cast<int64_t>(static_cast<uint64_t>(word()) * static_cast<uint64_t>(n) >> 32);
  }
  double uniform() { return (word() + 0.5) * 0x1p-32; }
  std::vector<int32_t> shuffled(int64_t n) {
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[below(i + 1)]);
    return order;
  }

 private:
  uint32_t lo_, hi_, run_, draw_ = 0;
};

// Distances with equal halves and a zero diagonal.
struct Table {
  int64_t heads;
  std::vector<double> at;
  double largest = 0.0;
  const double* row(int64_t h) const { return at.data() + h * heads; }
};

// A partition into equal groups, with every head's distance to every group kept up to date.
struct Grouping {
  const Table* dist;
  int64_t num_groups, size;
  std::vector<int32_t> group;  // of each head
  std::vector<double> to;      // [heads][groups]

  Grouping(const Table& table, const std::vector<int32_t>& order, int64_t groups)
      : dist(&table),
        num_groups(groups),
        size(table.heads / groups),
        group(table.heads),
        to(table.heads * groups, 0.0) {
    const int64_t h = table.heads;
    for (int64_t i = 0; i < h; ++i) group[order[i]] = static_cast<int32_t>(i / size);
    for (int64_t a = 0; a < h; ++a)
      for (int64_t b = 0; b < h; ++b) to[a * num_groups + group[b]] += table.row(a)[b];
  }

  // Change of the inside distance if a and b change places.
  double delta(int64_t a, int64_t b) const {
    const double *from_a = to.data() + a * num_groups, *from_b = to.data() + b * num_groups;
    const int32_t x = group[a], y = group[b];
    return ((from_a[y] - from_a[x]) + (from_b[x] - from_b[y])) - 2.0 * dist->row(a)[b];
  }

  void swap(int64_t a, int64_t b) {
    const int32_t x = group[a], y = group[b];
    for (int64_t h = 0; h < dist->heads; ++h) {
      const double move = dist->row(h)[b] - dist->row(h)[a];
      to[h * num_groups + x] += move;
      to[h * num_groups + y] -= move;
    }
    std::swap(group[a], group[b]);
  }

  // From scratch, so that two partitions compare exactly.
  double cost() const {
    double sum = 0.0;
    for (int64_t a = 0; a < dist->heads; ++a)
      for (int64_t b = a + 1; b < dist->heads; ++b)
        if (group[a] == group[b]) sum += dist->row(a)[b];
    return sum;
  }
};

// `least` is the smallest gain that counts: below it rounding could go round in circles.
void descend(Grouping& g, double least) {
  for (;;) {
    double best = -least;
    int64_t best_a = -1, best_b = -1;
    for (int64_t a = 0; a < g.dist->heads; ++a)
      for (int64_t b = a + 1; b < g.dist->heads; ++b) {
        if (g.group[a] == g.group[b]) continue;
        const double change = g.delta(a, b);
        if (change < best) best = change, best_a = a, best_b = b;
      }
    if (best_a < 0) return;
    g.swap(best_a, best_b);
  }
}

void anneal(Grouping& g, Random& random) {
  if (g.num_groups == 1) return;
  const int64_t h = g.dist->heads;
  std::vector<int32_t> others;
  for (double temperature = kStart; temperature > kEnd; temperature *= kFactor) {
    const int64_t a = random.below(h);
    others.clear();
    for (int64_t b = 0; b < h; ++b)
      if (g.group[b] != g.group[a]) others.push_back(static_cast<int32_t>(b));
    const int64_t b = others[random.below(static_cast<int64_t>(others.size()))];
    const double rise = -g.delta(a, b), draw = random.uniform();
    if (rise > 0.0 || draw < std::exp(rise / temperature)) g.swap(a, b);
  }
}

template <class T>
Table read_table(const Tensor& dist) {
  const int64_t h = dist.sizes()[0], rows = dist.strides()[0], columns = dist.strides()[1];
  const T* from = data_as<T>(dist);
  Table table{h, std::vector<double>(h * h)};
  for (int64_t a = 0; a < h; ++a)
    for (int64_t b = 0; b < h; ++b) {
      const double x = from[a * rows + b * columns];
      TENFOLD_CHECK_VALUE(std::isfinite(x), "tenfold::group_heads: dist must be finite, got ", x,
                          " at [", a, ", ", b, "]");
      const double both =
          a == b ? 0.0 : (x + static_cast<double>(from[b * rows + a * columns])) * 0.5;
      table.at[a * h + b] = both;
      table.largest = std::max(table.largest, std::fabs(both));
    }
  return table;
}

// Best of all starts. Starts are independent, so they may run on any thread.
std::vector<int32_t> solve_by_swaps(const Table& table, int64_t num_groups, int64_t restarts,
                                    int64_t seed) {
  const int64_t h = table.heads;
  const double least = 1e-12 * static_cast<double>(h) * table.largest;
  std::vector<std::vector<int32_t>> found(restarts);
  std::vector<double> cost(restarts);
  // A descent is about h swaps, each after h^2 / 2 changes of a nanosecond.
  const double micros = static_cast<double>(h * h * h) * 5e-4;
  parallel_for(restarts, micros, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      std::vector<int32_t> order(h);
      std::iota(order.begin(), order.end(), 0);
      if (run > 0) order = Random(seed, run).shuffled(h);
      Grouping g(table, order, num_groups);
      descend(g, least);
      cost[run] = g.cost();
      found[run] = std::move(g.group);
    }
  });
  return found[std::min_element(cost.begin(), cost.end()) - cost.begin()];
}

std::vector<int32_t> solve(const Table& table, int64_t num_groups, GroupSolver solver,
                           int64_t restarts, int64_t seed) {
  if (solver == GroupSolver::swap) return solve_by_swaps(table, num_groups, restarts, seed);
  Random random(seed, 0);
  std::vector<int32_t> order(table.heads);
  std::iota(order.begin(), order.end(), 0);
  if (solver == GroupSolver::paper_sa) order = random.shuffled(table.heads);
  Grouping g(table, order, num_groups);
  if (solver == GroupSolver::paper_sa) anneal(g, random);
  return g.group;
}

Tensor group_heads_op(Tensor dist, int64_t n_groups, std::string_view solver_name, int64_t restarts,
                      int64_t seed) {
  const GroupSolver solver =
      check_group_heads("group_heads", dist, n_groups, solver_name, restarts);
  const Table table =
      dist.scalar_type() == ScalarType::Double ? read_table<double>(dist) : read_table<float>(dist);
  const auto group = solve(table, n_groups, solver, restarts, seed);
  const int64_t size = table.heads / n_groups;
  const Tensor out = new_output(dist, {n_groups, size}, ScalarType::Int);
  // Groups take their rows in the order of their first heads.
  std::vector<int64_t> row(n_groups, -1), filled(n_groups, 0);
  int64_t rows = 0;
  for (int64_t h = 0; h < table.heads; ++h) {
    int64_t& at = row[group[h]];
    if (at < 0) at = rows++;
    data_as<int32_t>(out)[at * size + filled[group[h]]++] = static_cast<int32_t>(h);
  }
  return out;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("group_heads", TORCH_BOX(&tenfold::cpu::group_heads_op));
}
