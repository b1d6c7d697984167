// SPDX-License-Identifier: Apache-2.0
#include "influence/cpu/stretches.h"

#include <algorithm>

#include "core/parallel.h"

namespace tenfold::cpu {
namespace {

// Steps of a stretch: as many as make its shares about as large as the sums of all training
// examples, each of which is then read and written for a few entries at once.
int64_t most_steps(int64_t rows) {
  return std::max<int64_t>(512, 2 * rows);
}

}  // namespace

Stretches::Stretches(const MarkovCall& c, const int32_t* ids, const std::vector<int64_t>& lengths) {
  const int64_t steps = c.runs * c.steps;
  const int64_t count = std::max<int64_t>(1, ceil_div(steps, most_steps(c.rows)));
  longest_ = ceil_div(steps, count);
  places_.resize(static_cast<size_t>(steps * c.batch));
  std::vector<int32_t> next(static_cast<size_t>(c.rows));
  // f(row, step of the stretch) for every entry of steps [begin, end) that there is.
  const auto each = [&](int64_t begin, int64_t end, const auto& f) {
    for (int64_t step = begin; step < end; ++step) {
      if (!lengths.empty() && step % c.steps >= lengths[static_cast<size_t>(step / c.steps)])
        continue;
      for (int64_t b = 0; b < c.batch; ++b) {
        const int32_t row = ids[step * c.batch + b];
        if (row >= 0) f(static_cast<size_t>(row), static_cast<int32_t>(step - begin));
      }
    }
  };
  int64_t place = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = std::min(steps, i * longest_), end = std::min(steps, begin + longest_);
    parts_.push_back({begin, end, static_cast<int64_t>(rows_.size()), place});
    std::fill(next.begin(), next.end(), 0);
    each(begin, end, [&](size_t row, int32_t) { ++next[row]; });
    int32_t before = 0;
    for (size_t row = 0; row < next.size(); ++row) {
      const int32_t entries = next[row];
      next[row] = before;
      before += entries;
      if (entries == 0 && count > 1) continue;  // one stretch writes all rows
      rows_.push_back(static_cast<int32_t>(row));
      ends_.push_back(before);
    }
    int32_t* const to = places_.data() + place;
    each(begin, end, [&](size_t row, int32_t step) { to[next[row]++] = step; });
    place += before;
  }
}

MarkovStretch Stretches::operator[](int64_t i) const {
  const Part& part = parts_[static_cast<size_t>(i)];
  const int64_t after =
      i + 1 < count() ? parts_[static_cast<size_t>(i + 1)].row : static_cast<int64_t>(rows_.size());
  return {part.begin,
          part.end,
          after - part.row,
          rows_.data() + part.row,
          ends_.data() + part.row,
          places_.data() + part.place};
}

}  // namespace tenfold::cpu
