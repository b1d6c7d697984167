// SPDX-License-Identifier: Apache-2.0
// The only threading of the CPU kernels: torch's own pool, so torch.set_num_threads is obeyed.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace tenfold {

// Waking a second thread costs about 14 us; below this much work per task one thread does it all.
constexpr double kMinTaskMicros = 20.0;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// [0, n) in `count` parts of whole units (the last may be shorter), as equal as can be.
struct Parts {
  int64_t n, unit, count;
  int64_t begin(int64_t i) const { return std::min(n, i * ceil_div(n, unit) / count * unit); }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
};

// Runs f(begin, end) over [0, n) with at least enough items per thread to amortise the wake-up.
template <class F>
void parallel_for(int64_t n, double micros_per_item, const F& f) {
  if (n <= 0) return;
  const double per_thread = kMinTaskMicros / (micros_per_item > 1e-6 ? micros_per_item : 1e-6);
  const int64_t grain = per_thread < 1.0    ? 1
                        : per_thread > 1e15 ? n
                                            : static_cast<int64_t>(per_thread);
  if (n <= grain) return f(0, n);
  torch::stable::parallel_for(0, n, grain, f);
}

// Threads take items [0, n) one by one from a common counter, so that items of unequal size (causal
// rows) balance. `make` gives each thread its own `run(item)`.
template <class Make>
void for_each_task(int64_t n, double total_micros, const Make& make) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const auto worth = static_cast<int64_t>(std::min(total_micros / kMinTaskMicros, 1e6));
  const int64_t workers = std::max<int64_t>(1, std::min({threads, n, worth}));
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    auto run = make();
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) run(i);
  };
  if (workers == 1) return work(0, 1);
  torch::stable::parallel_for(0, workers, 1, work);
}

}  // namespace tenfold
