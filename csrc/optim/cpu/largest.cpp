// SPDX-License-Identifier: Apache-2.0
// The selection of largest.h; mask_topk.h has the method.
#include "optim/cpu/largest.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "core/parallel.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kLeastSampled = 1 << 14;
constexpr int64_t kFew = 1 << 10;    // up to here a histogram costs more than the keys
constexpr double kDeviations = 3.5;  // half the width of the guessed range, in standard deviations

struct Problem {
  const Keys& keys;
  int64_t n, k;
  uint8_t* bits;  // may be null
  double micros;  // of one task
  int64_t tasks() const { return (n + kKeyTask - 1) / kKeyTask; }
};

// Calls f(first, count, keys) for the blocks of keys of a task.
template <class F>
void for_each_block(const Problem& p, int64_t task, const F& f) {
  alignas(64) uint32_t keys[kKeyBlock];
  const int64_t end = std::min(p.n, (task + 1) * kKeyTask);
  for (int64_t at = task * kKeyTask; at < end; at += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end - at);
    p.keys.block(at, count, keys);
    f(at, count, keys);
  }
}

// -- the range that most likely holds the cut ---------------------------------------------------

KeyRange range_between(uint32_t low, uint32_t high) {
  return {low, high - low + 1};  // 0 if it is all keys
}

KeyRange guess_uniform(const Problem& p) {
  const double share = static_cast<double>(p.k) / static_cast<double>(p.n);
  const double spread =
      kDeviations * std::sqrt(share * (1.0 - share) / static_cast<double>(p.n)) + 1e-9;
  const auto key = [](double rank) {  // the key that a share `rank` of all keys is above
    return static_cast<uint32_t>(std::clamp((1.0 - rank) * 4294967296.0, 0.0, 4294967295.0));
  };
  return range_between(key(share + spread), key(share - spread));
}

// A random read costs as much as tens of keys in order, a key inside the range a few.
int64_t samples_of(int64_t n) {
  return n < 1 << 18 ? 1 << 10 : n < 1 << 22 ? 1 << 13 : 1 << 15;
}

// Positions are spread evenly, one in each of as many equal parts, where a hash says: nothing
// periodic in the scores keeps step with it.
KeyRange guess_by_sample(const Problem& p) {
  const int64_t samples = samples_of(p.n);
  std::vector<int64_t> at(samples);
  std::vector<uint32_t> keys(samples);
  const double part = static_cast<double>(p.n) / static_cast<double>(samples);
  parallel_for(samples / 64, 1.5, [&](int64_t begin, int64_t end) {
    for (int64_t j = 64 * begin; j < 64 * end; ++j) {
      const auto hash = static_cast<uint32_t>(j) * 0x9E3779B9u;
      const double inside = (static_cast<double>(j) + hash * 0x1p-32) * part;
      at[j] = std::min(p.n - 1, static_cast<int64_t>(inside));
    }
    p.keys.sample(at.data() + begin * 64, (end - begin) * 64, keys.data() + begin * 64);
  });
  const double share = static_cast<double>(p.k) / static_cast<double>(p.n);
  const double middle = share * static_cast<double>(samples);
  const double spread = kDeviations * std::sqrt(middle * (1.0 - share)) + 2.0;
  const auto above = static_cast<int64_t>(std::floor(middle - spread));
  const auto below = static_cast<int64_t>(std::ceil(middle + spread));
  uint32_t high = kNanKey, low = 0;  // beyond the sample: no limit
  auto first = keys.begin();
  if (above >= 0) {
    std::nth_element(first, keys.begin() + above, keys.end(), std::greater<>());
    first = keys.begin() + above;
    high = *first;
  }
  if (below < samples) {
    std::nth_element(first, keys.begin() + below, keys.end(), std::greater<>());
    low = keys[below];
  }
  return range_between(low, high);
}

// -- one pass ---------------------------------------------------------------------------------

// What the tasks found inside the range, in order.
struct Found {
  std::vector<std::vector<uint32_t>> keys;
  std::vector<std::vector<uint16_t>> at;  // from the task's first element on
  explicit Found(int64_t tasks) : keys(tasks), at(tasks) {}
};

void find_inside(const Problem& p, KeyRange range, int shift, int64_t task, Found* all,
                 int64_t* above, KeyBins* bins) {
  std::vector<uint32_t>& found_keys = all->keys[task];
  std::vector<uint16_t>& found_at = all->at[task];
  alignas(64) uint32_t inside[kKeyBlock + 64], at[kKeyBlock + 64];
  uint8_t unwanted[kKeyBlock / 8];
  for_each_block(p, task, [&](int64_t first, int64_t count, const uint32_t* keys) {
    uint8_t* const bits = p.bits == nullptr ? unwanted : p.bits + first / 8;
    const int64_t found = TENFOLD_ISA_CALL(topk_mark, keys, count, range, bits, above, inside, at);
    const int64_t offset = first - task * kKeyTask;
    for (int64_t j = 0; j < found; ++j) ++(*bins)[(inside[j] - range.first) >> shift];
    found_keys.insert(found_keys.end(), inside, inside + found);
    const auto before = static_cast<int64_t>(found_at.size());
    found_at.resize(before + found);
    for (int64_t j = 0; j < found; ++j)
      found_at[before + j] = static_cast<uint16_t>(offset + at[j]);
  });
}

void set_chosen(const Problem& p, int64_t task, const Found& found, Cut cut) {
  uint8_t* const bits = p.bits + task * kKeyTask / 8;
  const std::vector<uint32_t>& keys = found.keys[task];
  const std::vector<uint16_t>& at = found.at[task];
  for (size_t j = 0; j < at.size(); ++j) {
    const bool tie = keys[j] == cut.key && cut.ties > 0;
    cut.ties -= tie ? 1 : 0;
    const auto bit = static_cast<uint8_t>(tie || keys[j] > cut.key ? 1 : 0);
    bits[at[j] >> 3] |= static_cast<uint8_t>(bit << (at[j] & 7));
  }
}

// Empty if the range did not hold the cut, or too much; then the bits are garbage.
std::vector<Cut> cut_in_one_pass(const Problem& p, KeyRange range) {
  const int shift = bin_shift(range);
  const int64_t most = p.n / 8 + kKeyTask;
  Found found(p.tasks());
  std::vector<int64_t> above(p.tasks());
  KeyBins bins;
  std::atomic<int64_t> total{0};
  parallel_for(p.tasks(), p.micros, [&](int64_t begin, int64_t end) {
    KeyBins own;
    for (int64_t task = begin; task < end && total.load() <= most; ++task) {
      find_inside(p, range, shift, task, &found, &above[task], &own);
      total += static_cast<int64_t>(found.at[task].size());
    }
    bins.add(own);
  });
  int64_t wanted = p.k;
  for (const int64_t a : above) wanted -= a;
  if (total > most || wanted < 0 || wanted > total) return {};
  if (wanted == 0) return std::vector<Cut>(p.tasks(), {range.first + range.width - 1, 0});
  const double micros = p.micros / 16.0;
  const std::vector<Cut> cuts = cuts_inside(range, found.keys, bins, wanted, micros);
  if (p.bits != nullptr)
    parallel_for(p.tasks(), micros, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) set_chosen(p, task, found, cuts[task]);
    });
  return cuts;
}

// -- several passes ----------------------------------------------------------------------------

// Empty if `key` is not the cut.
std::vector<Cut> cut_at_key(const Problem& p, uint32_t key) {
  std::vector<int64_t> ties(p.tasks()), above(p.tasks());
  parallel_for(p.tasks(), p.micros, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for_each_block(p, task, [&](int64_t, int64_t count, const uint32_t* keys) {
        ties[task] += TENFOLD_ISA_CALL(topk_count, keys, count, key, &above[task]);
      });
  });
  int64_t left = p.k, equal = 0;
  for (int64_t task = 0; task < p.tasks(); ++task) {
    left -= above[task];
    equal += ties[task];
  }
  if (left < 0 || left > equal) return {};
  std::vector<Cut> cuts;
  for (const int64_t t : ties) {
    cuts.push_back({key, left});
    left = std::max<int64_t>(0, left - t);
  }
  if (p.bits == nullptr) return cuts;
  parallel_for(p.tasks(), p.micros, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t ties_left = cuts[task].ties;
      for_each_block(p, task, [&](int64_t first, int64_t count, const uint32_t* keys) {
        ties_left = TENFOLD_ISA_CALL(topk_write, keys, count, key, ties_left, p.bits + first / 8);
      });
    }
  });
  return cuts;
}

std::vector<Cut> cut_by_radix(const Problem& p) {
  KeyRange range{0, 0};
  int64_t wanted = p.k;
  for (const int shift : {21, 10, 0}) {
    KeyBins bins;
    parallel_for(p.tasks(), p.micros, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> counts(4 * kKeyBins);
      KeyBins own;
      for (int64_t task = begin; task < end; ++task) {
        for_each_block(p, task, [&](int64_t, int64_t count, const uint32_t* keys) {
          TENFOLD_ISA_CALL(topk_histogram, keys, count, range, shift, counts.data());
        });
        for (int i = 0; i < 4 * kKeyBins; ++i) own[i % kKeyBins] += std::exchange(counts[i], 0);
      }
      bins.add(own);
    });
    range = {range.first + (static_cast<uint32_t>(bins.find(&wanted)) << shift), 1u << shift};
  }
  return cut_at_key(p, range.first);
}

std::vector<Cut> cut_of_few(const Problem& p) {
  Cut cut{};
  for_each_block(p, 0, [&](int64_t, int64_t count, const uint32_t* keys) {
    uint32_t copy[kFew];
    std::copy_n(keys, count, copy);
    std::nth_element(copy, copy + (p.k - 1), copy + count, std::greater<>());
    cut.key = copy[p.k - 1];
    cut.ties = p.k - std::count_if(copy, copy + count, [&](uint32_t x) { return x > cut.key; });
    if (p.bits != nullptr) TENFOLD_ISA_CALL(topk_write, keys, count, cut.key, cut.ties, p.bits);
  });
  return {cut};
}

}  // namespace

void KeyBins::add(const KeyBins& other) {
  while (adding_.test_and_set(std::memory_order_acquire)) {
  }
  for (int i = 0; i < kKeyBins; ++i) counts_[i] += other.counts_[i];
  adding_.clear(std::memory_order_release);
}

int64_t KeyBins::find(int64_t* wanted) const {
  int64_t bin = kKeyBins - 1;
  while (counts_[bin] < *wanted) *wanted -= counts_[bin--];
  return bin;
}

int bin_shift(KeyRange range) {
  int shift = 0;
  while ((range.width - 1) >> shift >= kKeyBins) ++shift;
  return shift;
}

std::vector<Cut> cuts_inside(KeyRange range, const std::vector<std::vector<uint32_t>>& inside,
                             const KeyBins& bins, int64_t wanted, double micros) {
  const int shift = bin_shift(range);
  const auto bin = static_cast<uint32_t>(bins.find(&wanted));
  const auto tasks = static_cast<int64_t>(inside.size());
  std::vector<std::vector<uint32_t>> boundary(tasks);  // the keys in the bin of the cut
  parallel_for(tasks, micros, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (const uint32_t key : inside[task])
        if ((key - range.first) >> shift == bin) boundary[task].push_back(key);
  });
  std::vector<uint32_t> all;
  for (const auto& keys : boundary) all.insert(all.end(), keys.begin(), keys.end());
  std::nth_element(all.begin(), all.begin() + (wanted - 1), all.end(), std::greater<>());
  const uint32_t key = all[wanted - 1];
  int64_t left = wanted;
  for (const uint32_t other : all) left -= other > key ? 1 : 0;
  std::vector<Cut> cuts;
  for (const auto& keys : boundary) {
    cuts.push_back({key, left});
    left = std::max<int64_t>(0, left - std::count(keys.begin(), keys.end(), key));
  }
  return cuts;
}

std::vector<Cut> find_largest(const Keys& keys, int64_t n, int64_t k, double micros,
                              uint8_t* bits) {
  const Problem p{keys, n, k, bits, micros};
  if (n <= kFew) return cut_of_few(p);
  if (n >= kLeastSampled) {
    const KeyRange range = keys.uniform() ? guess_uniform(p) : guess_by_sample(p);
    if (range.width > 0) {
      std::vector<Cut> cuts =
          range.width == 1 ? cut_at_key(p, range.first) : cut_in_one_pass(p, range);
      if (!cuts.empty()) return cuts;
    }
  }
  return cut_by_radix(p);
}

}  // namespace tenfold::cpu
