// SPDX-License-Identifier: Apache-2.0
// Pieces of samples, shared out among threads.
#pragma once

#include "core/parallel.h"

namespace tenfold::cpu {

constexpr int64_t kSpan = 16384;  // elements of a task, whatever their size

// f(sample, first element, how many) for pieces that cover all samples of `each` elements. What a
// thread has of one sample comes as one piece.
template <class F>
void for_spans(int64_t samples, int64_t each, double micros_per_element, const F& f) {
  if (each == 0) return;
  const int64_t per_sample = ceil_div(each, kSpan);
  const auto size = static_cast<double>(std::min(kSpan, each));
  parallel_for(samples * per_sample, micros_per_element * size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t sample = i / per_sample, first = i % per_sample * kSpan;
      const int64_t spans = std::min(end - i, per_sample - i % per_sample);
      f(sample, first, std::min(spans * kSpan, each - first));
      i += spans;
    }
  });
}

}  // namespace tenfold::cpu
