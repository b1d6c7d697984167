// The only threading of the CPU kernels: torch's own pool, so torch.set_num_threads is obeyed.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace tenfold {

// Waking a second thread costs about 14 us; below this much work per task one thread does it all.
constexpr double kMinTaskMicros = 20.0;

// Runs f(begin, end) over [0, n) with at least enough items per thread to amortise the wake-up.
template <class F>
void parallel_for(int64_t n, double micros_per_item, const F& f) {
  if (n <= 0) return;
  const double per_thread = kMinTaskMicros / (micros_per_item > 1e-6 ? micros_per_item : 1e-6);
  const int64_t grain = per_thread < 1.0    ? 1
                        : per_thread > 1e15 ? n
                                            : static_cast<int64_t>(per_thread);
  torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace tenfold
