// SPDX-License-Identifier: Apache-2.0
// What the CPU registrations of both AdamW ops share: scalars, steps, and work over all tensors.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/parallel.h"
#include "optim/adamw_ops.h"

namespace tenfold::cpu {

// False if found_inf says that this step is to be left out.
inline bool is_finite_step(const OptTensor& found_inf) {
  return !found_inf || *data_as<float>(*found_inf) == 0.0f;
}

// Advances every step; the numbers that go with it, one entry per tensor.
template <class Call>
std::vector<AdamwScalars> advance_steps(const Call& call, const OptTensor& grad_scale,
                                        const OptTensor& clip_coef) {
  const float scale = grad_scale ? *data_as<float>(*grad_scale) : 1.0f;
  const float clip = clip_coef ? *data_as<float>(*clip_coef) : 1.0f;
  std::vector<AdamwScalars> scalars;
  scalars.reserve(call.tensors.size());
  float last = NAN;
  for (const AdamwTensor& t : call.tensors) {
    *t.step += 1.0f;
    if (*t.step == last) {  // the usual case; powers in double cost more than a small tensor
      scalars.push_back(scalars.back());
    } else {
      scalars.push_back(adamw_scalars(call.options, *t.step, scale, clip));
    }
    last = *t.step;
  }
  return scalars;
}

// f(tensor, begin, end) over pieces of all tensors, cut at multiples of `grain` elements. Threads
// take pieces as they get free: masks and a busy machine make equal shares unequal work.
template <class T, class F>
void over_all_tensors(const std::vector<T>& tensors, int64_t grain, double micros_per_grain,
                      const F& f) {
  std::vector<int64_t> starts;  // grains before every tensor
  starts.reserve(tensors.size());
  int64_t total = 0;
  for (const AdamwTensor& t : tensors) {
    starts.push_back(total);
    total += (t.numel + grain - 1) / grain;
  }
  const auto work = [&](int64_t from, int64_t to) {
    auto at = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), from) -
                                  starts.begin() - 1);
    for (; from < to; ++at) {
      const int64_t grains = (tensors[at].numel + grain - 1) / grain;
      const int64_t first = from - starts[at], last = std::min(grains, to - starts[at]);
      if (first < last) f(at, first * grain, std::min(last * grain, tensors[at].numel));
      from = starts[at] + std::max(last, first);
    }
  };
  constexpr int64_t kMostGrains = 64;  // what a thread takes at once
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || static_cast<double>(total) * micros_per_grain < 2 * kMinTaskMicros)
    return work(0, total);
  const int64_t step = std::clamp<int64_t>(total / (8 * threads), 1, kMostGrains);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t from = next.fetch_add(step, std::memory_order_relaxed);
      if (from >= total) return;
      work(from, std::min(from + step, total));
    }
  });
}

}  // namespace tenfold::cpu
