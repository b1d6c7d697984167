// SPDX-License-Identifier: Apache-2.0
// Slots of a routed batch, sorted by expert. Slot t k + j is choice j of token t; index [T, k]
// names its expert. A stable counting sort: slots of an expert keep their order, those without one
// of `num_experts` (sentinels of expert parallelism) come last and belong to nobody.
#pragma once

#include <cstdint>
#include <vector>

namespace tenfold {

struct SortedSlots {
  std::vector<int32_t> order;    // [S] slot at a position
  std::vector<int32_t> inverse;  // [S] position of a slot
  std::vector<int32_t> row;      // [S] token at a position
  std::vector<int64_t> offsets;  // [experts + 1] first position of an expert
  int64_t routed() const { return offsets.back(); }
};

// `expert(slot)`: 0 or above.
template <class Expert>
SortedSlots sort_slots(int64_t slots, int64_t k, int64_t num_experts, const Expert& expert) {
  SortedSlots s{std::vector<int32_t>(slots), std::vector<int32_t>(slots),
                std::vector<int32_t>(slots), std::vector<int64_t>(num_experts + 1)};
  std::vector<int64_t> next(num_experts + 2);
  const auto bucket = [&](int64_t slot) {
    const int64_t e = expert(slot);
    return e < num_experts ? e : num_experts;
  };
  for (int64_t i = 0; i < slots; ++i) ++next[bucket(i) + 1];
  for (int64_t e = 0; e <= num_experts; ++e) {
    next[e + 1] += next[e];
    s.offsets[e] = next[e];
  }
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t at = next[bucket(i)]++;
    s.order[at] = static_cast<int32_t>(i);
    s.inverse[i] = static_cast<int32_t>(at);
    s.row[at] = static_cast<int32_t>(i / k);
  }
  return s;
}

}  // namespace tenfold
