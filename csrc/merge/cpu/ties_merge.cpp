// SPDX-License-Identifier: Apache-2.0
// The cuts of ties_merge, and the merge by them: see ties.h.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "core/scratch.h"
#include "merge/cpu/merge_host.h"
#include "merge/cpu/ties.h"
#include "optim/cpu/largest.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kOnePassFrom = int64_t{1} << 18;  // elements
constexpr int64_t kGroup = 16;                      // neighbours that are sampled together
constexpr int64_t kMostGroups = 1 << 15;
constexpr int64_t kChunk = 64;        // groups of a task
constexpr double kDeviations = 3.5;   // half the width of the range, in standard deviations
constexpr int64_t kMostBetween = 24;  // of so many elements, one
constexpr double kMicros = 30.0;      // of one task and expert

constexpr uint32_t kLargest = 0x80000000u;  // key: of NaN

using Cuts = std::vector<Cut>;  // of each task

class Magnitudes final : public Keys {
 public:
  Magnitudes(const DeltaMerge& m, int expert) : m_(m), expert_(m.expert[expert]) {}
  void block(int64_t begin, int64_t n, uint32_t* keys) const override {
    TENFOLD_ISA_CALL(magnitude_keys, m_.base, expert_, m_.dtype, begin, n, keys);
  }
  void sample(const int64_t* at, int64_t n, uint32_t* keys) const override {
    TENFOLD_ISA_CALL(magnitude_sample, m_.base, expert_, m_.dtype, at, n, keys);
  }

 private:
  const DeltaMerge& m_;
  const void* expert_;
};

// -- where the cut of an expert most likely lies
// ----------------------------------------------------

// An element as it is ranked: its key, and among equal keys the lower place first.
using Ranked = uint64_t;
constexpr uint32_t key_of(Ranked r) {
  return static_cast<uint32_t>(r >> 32);
}
constexpr int64_t place_of(Ranked r) {
  return 0xFFFFFFFF - static_cast<int64_t>(r & 0xFFFFFFFF);
}

// The cut lies between these. Places are those of tasks: at the key of `high`, elements of tasks
// before its own are kept, at that of `low` none after its own are.
struct Guess {
  Ranked high, low;
  double share;  // of all elements that are in between
};

// A sample of groups of neighbours, which cost as much to read as one element each. Neighbours are
// alike where rows or columns have scales of their own, so the error of the sample is estimated
// from how much the groups differ.
class GroupSample {
 public:
  GroupSample(const DeltaMerge& m, int expert, int64_t n)
      : m_(m),
        expert_(m.expert[expert]),
        n_(n),
        groups_(std::min(kMostGroups, n / (16 * kGroup)) / kChunk * kChunk),
        keys_(groups_ * kGroup * 4) {}

  Guess guess(double share) {
    over_chunks(4.0, [&](int64_t chunk) { read(chunk); });
    const Rough rough = guess_roughly(share);
    std::vector<Counted> counted(groups_ / kChunk);
    over_chunks(2.0, [&](int64_t chunk) { counted[chunk] = count(chunk, rough); });
    Counted all;
    for (const Counted& c : counted) all.add(c);
    return narrow(share, rough, &all);
  }

 private:
  struct Rough {
    uint32_t high, middle, low;
  };
  struct Counted {
    int64_t above = 0;            // keys above `high`
    double sum = 0, squares = 0;  // of the groups' counts of keys above `middle`
    std::vector<Ranked> between;  // keys from `low` to `high`
    void add(const Counted& other) {
      above += other.above, sum += other.sum, squares += other.squares;
      between.insert(between.end(), other.between.begin(), other.between.end());
    }
  };

  template <class F>
  void over_chunks(double micros, const F& f) const {
    parallel_for(groups_ / kChunk, micros, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
    });
  }
  uint32_t* group(int64_t i) const { return static_cast<uint32_t*>(keys_.data()) + i * kGroup; }

  // Positions are spread evenly, one in each of as many equal parts, where a hash says: nothing
  // periodic keeps step with it.
  int64_t position(int64_t i) const {
    const double part = static_cast<double>(n_ - kGroup) / static_cast<double>(groups_);
    const double inside = static_cast<double>(static_cast<uint32_t>(i) * 0x9E3779B9u) * 0x1p-32;
    return static_cast<int64_t>((static_cast<double>(i) + inside) * part) / kGroup * kGroup;
  }

  void read(int64_t chunk) {
    constexpr int64_t kAhead = 12;  // groups lie far apart
    const int64_t size = dtype_size(m_.dtype);
    for (int64_t i = chunk * kChunk; i < (chunk + 1) * kChunk; ++i) {
      const int64_t next = position(std::min(i + kAhead, groups_ - 1)) * size;
      __builtin_prefetch(static_cast<const char*>(m_.base) + next);
      __builtin_prefetch(static_cast<const char*>(expert_) + next);
      TENFOLD_ISA_CALL(magnitude_keys, m_.base, expert_, m_.dtype, position(i), kGroup, group(i));
    }
  }

  // From one key of every fourth group, with room for more than its error.
  Rough guess_roughly(double share) const {
    std::vector<uint32_t> some;
    for (int64_t i = 0; i < groups_; i += 4) some.push_back(group(i)[i / 4 % kGroup]);
    const auto count = static_cast<double>(some.size());
    const double middle = share * count;
    const double spread = 4.5 * std::sqrt(middle * (1.0 - share)) + 4.0;
    const auto key = [&](double rank, auto from) {
      const auto at = some.begin() + std::clamp(static_cast<int64_t>(rank), int64_t{0},
                                                static_cast<int64_t>(some.size()) - 1);
      std::nth_element(from, at, some.end(), std::greater<>());
      return at;
    };
    const auto high = key(middle - spread, some.begin());
    const auto mid = key(middle, high);
    const auto low = key(middle + spread, mid);
    return {middle < spread ? kLargest : *high, *mid, middle + spread > count - 1.0 ? 0 : *low};
  }

  Counted count(int64_t chunk, const Rough& rough) const {
    Counted c;
    for (int64_t i = chunk * kChunk; i < (chunk + 1) * kChunk; ++i) {
      const auto place = static_cast<Ranked>(0xFFFFFFFF - position(i) / kKeyTask);
      int in_group = 0;
      for (int64_t j = 0; j < kGroup; ++j) {
        const uint32_t key = group(i)[j];
        in_group += key > rough.middle ? 1 : 0;
        c.above += key > rough.high ? 1 : 0;
        if (key >= rough.low && key <= rough.high)
          c.between.push_back(static_cast<Ranked>(key) << 32 | place);
      }
      c.sum += in_group, c.squares += in_group * in_group;
    }
    return c;
  }

  Guess narrow(double share, const Rough& rough, Counted* c) const {
    const auto groups = static_cast<double>(groups_), count = groups * kGroup;
    const double mean = c->sum / groups;
    const double variance = std::max(c->squares / groups - mean * mean, 0.0);
    const double spread = kDeviations * std::sqrt(variance * groups) + 2.0;
    std::vector<Ranked>& between = c->between;
    const auto pick = [&](double rank, Ranked otherwise) {
      const auto at = static_cast<int64_t>(rank) - c->above;
      if (at < 0 || at >= static_cast<int64_t>(between.size())) return otherwise;
      std::nth_element(between.begin(), between.begin() + at, between.end(), std::greater<>());
      return between[at];
    };
    const Ranked high =
        pick(share * count - spread, static_cast<Ranked>(rough.high) << 32 | 0xFFFFFFFF);
    const Ranked low = pick(share * count + spread, static_cast<Ranked>(rough.low) << 32);
    const auto inside = std::count_if(between.begin(), between.end(),
                                      [&](Ranked r) { return r >= low && r <= high; });
    return {high, low, static_cast<double>(inside) / count};
  }

  const DeltaMerge& m_;
  const void* expert_;
  int64_t n_, groups_;
  Scratch keys_;
};

// -- the pass
// ---------------------------------------------------------------------------------------

class OnePass {
 public:
  OnePass(const DeltaMerge& m, int64_t n, const std::vector<int64_t>& kept, bool merge)
      : m_(m),
        n_(n),
        size_(dtype_size(m.dtype)),
        kept_(kept),
        merge_(merge),
        guesses_(m.experts),
        found_(ceil_div(n, kKeyTask)),
        above_(m.experts) {}

  // The cuts of each expert, empty if they could not be found so; out is garbage then.
  std::vector<Cuts> run() {
    double between = 0.0;
    for (int e = 0; e < m_.experts; ++e) between += guess(e);
    if (between * kMostBetween > 1.0 || !pass()) return {};
    std::vector<Cuts> cuts;
    for (int e = 0; e < m_.experts; ++e) {
      cuts.push_back(find_cuts(e));
      if (cuts.back().empty()) return {};
    }
    return cuts;
  }

  // Merges again what was in between.
  void finish(const std::vector<Cuts>& cuts) const {
    over_tasks(kMicros / kMostBetween, [&](int64_t task) {
      const Found& f = found_[task];
      const auto count = static_cast<int64_t>(f.at.size());
      DeltaMerge few = m_;
      std::vector<char> out(count * size_);
      few.base = f.values.data();
      few.out = out.data();
      few.past_caches = false;
      int64_t ties[kMaxExperts];
      for (int e = 0; e < m_.experts; ++e) {
        few.expert[e] = f.values.data() + (e + 1) * count * size_;
        few.cut[e] = cuts[e][task].key;
        ties[e] = cuts[e][task].ties;
      }
      TENFOLD_ISA_CALL(delta_merge, few, 0, count, ties);
      char* const to = static_cast<char*>(m_.out) + task * kKeyTask * size_;
      for (int64_t j = 0; j < count; ++j) copy_one(out.data(), j, to, f.at[j]);
    });
  }

 private:
  // The elements of a task that are in between: where from its first one on, and their base and
  // experts, [experts + 1, count].
  struct Found {
    std::vector<uint16_t> at;
    std::vector<char> values;
  };

  template <class F>
  void over_tasks(double micros, const F& f) const {
    parallel_for(static_cast<int64_t>(found_.size()), micros, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) f(task);
    });
  }
  void copy_one(const char* from, int64_t i, char* to, int64_t j) const {
    if (size_ == 2) {
      std::memcpy(to + 2 * j, from + 2 * i, 2);
    } else {
      std::memcpy(to + 4 * j, from + 4 * i, 4);
    }
  }

  bool all_or_none(int e) const { return kept_[e] == 0 || kept_[e] == n_; }

  // The share of all elements that is in between.
  double guess(int e) {
    if (all_or_none(e)) return 0.0;
    const double share = static_cast<double>(kept_[e]) / static_cast<double>(n_);
    guesses_[e] = GroupSample(m_, e, n_).guess(share);
    return guesses_[e].share;
  }

  // Keys in between, of elements of a task.
  KeyRange range_of(int64_t task, int e) const {
    const Guess& g = guesses_[e];
    const uint32_t first = key_of(g.low) + (task > place_of(g.low) ? 1 : 0);
    const uint32_t end = key_of(g.high) + (task < place_of(g.high) ? 0 : 1);
    return {first, end > first ? end - first : 0};
  }

  TiesLimits limits_of(int64_t task) const {
    // A key is a magnitude's bits + 1, and all NaN have one; here they are all above infinity.
    const auto magnitude_before = [](uint32_t key) {
      constexpr int64_t kInfinity = 0x7F800000;
      const int64_t before = int64_t{key} - 2;
      return static_cast<int32_t>(before < INT32_MAX ? std::min(before, kInfinity) : INT32_MAX);
    };
    TiesLimits limits;
    for (int e = 0; e < m_.experts; ++e) {
      const KeyRange range = range_of(task, e);
      const int32_t all = kept_[e] == n_ ? -1 : INT32_MAX;
      limits.below[e] = all_or_none(e) ? all : magnitude_before(range.first);
      limits.last[e] = all_or_none(e) ? all : magnitude_before(range.first + range.width);
    }
    return limits;
  }

  bool pass() {
    const int64_t most = n_ / kMostBetween * 2;
    std::atomic<int64_t> total{0};
    std::vector<int64_t> above(found_.size() * m_.experts);
    over_tasks(kMicros * m_.experts, [&](int64_t task) {
      if (total.load() > most) return;
      collect(task, &above[task * m_.experts]);
      total += static_cast<int64_t>(found_[task].at.size());
    });
    for (size_t i = 0; i < above.size(); ++i) above_[i % m_.experts] += above[i];
    return total.load() <= most;
  }

  void collect(int64_t task, int64_t* above) {
    uint16_t at[kKeyTask];
    const int64_t begin = task * kKeyTask, end = std::min(n_, begin + kKeyTask);
    const TiesLimits limits = limits_of(task);
    int64_t count = 0;
    for (int64_t i = begin; i < end; i += kTiesBlock) {
      const int64_t found = TENFOLD_ISA_CALL(ties_block, m_, limits, merge_, i,
                                             std::min(i + kTiesBlock, end), at + count, above);
      for (int64_t j = count; j < count + found; ++j) at[j] += static_cast<uint16_t>(i - begin);
      count += found;
    }
    Found& f = found_[task];
    f.at.assign(at, at + count);
    f.values.resize(count * size_ * (m_.experts + 1));
    for (int e = -1; e < m_.experts; ++e) {
      const void* const all = e < 0 ? m_.base : m_.expert[e];
      const char* const from = static_cast<const char*>(all) + begin * size_;
      char* const to = f.values.data() + (e + 1) * count * size_;
      for (int64_t j = 0; j < count; ++j) copy_one(from, at[j], to, j);
    }
  }

  Cuts find_cuts(int e) const {
    const auto tasks = static_cast<int64_t>(found_.size());
    if (kept_[e] == 0) return Cuts(tasks, {0xFFFFFFFFu, 0});
    if (kept_[e] == n_) return Cuts(tasks, {0, 0});  // below every key
    const uint32_t high = key_of(guesses_[e].high), low = key_of(guesses_[e].low);
    const KeyRange range{low, high - low + 1};
    const int shift = bin_shift(range);
    std::vector<std::vector<uint32_t>> inside(tasks);
    KeyBins bins;
    std::atomic<int64_t> total{0};
    parallel_for(tasks, kMicros / kMostBetween, [&](int64_t begin, int64_t end) {
      KeyBins own;
      for (int64_t task = begin; task < end; ++task) {
        inside[task] = keys_inside(task, e);
        for (const uint32_t key : inside[task]) ++own[(key - low) >> shift];
        total += static_cast<int64_t>(inside[task].size());
      }
      bins.add(own);
    });
    const int64_t wanted = kept_[e] - above_[e];
    if (wanted < 0 || wanted > total.load()) return {};
    Cuts cuts(tasks, {high, 0});
    if (wanted > 0) cuts = cuts_inside(range, inside, bins, wanted, kMicros / kMostBetween);
    for (int64_t task = 0; task < place_of(guesses_[e].high) && cuts[task].key == high; ++task)
      cuts[task].ties = INT64_MAX;
    return cuts;
  }

  std::vector<uint32_t> keys_inside(int64_t task, int e) const {
    const Found& f = found_[task];
    const KeyRange range = range_of(task, e);
    const auto count = range.width > 0 ? static_cast<int64_t>(f.at.size()) : 0;
    std::vector<uint32_t> keys(count + 64);
    TENFOLD_ISA_CALL(magnitude_keys, f.values.data(), f.values.data() + (e + 1) * count * size_,
                     m_.dtype, 0, count, keys.data());
    int64_t inside = 0;
    for (int64_t i = 0; i < count; ++i) {  // without a branch, which would be mispredicted
      const uint32_t key = keys[i];
      keys[inside] = key;
      inside += key - range.first < range.width ? 1 : 0;
    }
    keys.resize(inside);
    return keys;
  }

  const DeltaMerge& m_;
  int64_t n_, size_;
  const std::vector<int64_t>& kept_;
  bool merge_;
  std::vector<Guess> guesses_;  // of each expert
  std::vector<Found> found_;    // of each task
  std::vector<int64_t> above_;  // of each expert, above its limits
};

Cuts find_cuts(const DeltaMerge& m, int expert, int64_t n, int64_t kept) {
  if (kept == 0) return {{0xFFFFFFFFu, 0}};
  if (kept == n) return {{0, 0}};  // below every key
  return find_largest(Magnitudes(m, expert), n, kept, 20.0, nullptr);
}

}  // namespace

void run_ties_merge(DeltaMerge m, int64_t n, const std::vector<int64_t>& kept) {
  m.past_caches = leaves_caches(m, n);
  const bool over_input =
      m.out == m.base || std::find(m.expert, m.expert + m.experts, m.out) != m.expert + m.experts;
  std::vector<Cuts> cuts;
  if (n >= kOnePassFrom) {
    OnePass one(m, n, kept, !over_input);
    cuts = one.run();
    if (!cuts.empty() && !over_input) return one.finish(cuts);
  }
  if (cuts.empty())
    for (int e = 0; e < m.experts; ++e) cuts.push_back(find_cuts(m, e, n, kept[e]));
  for (int e = 0; e < m.experts; ++e) m.cut[e] = cuts[e][0].key;
  for_each_part(n, kKeyTask, kMicros * m.experts, [&](int64_t begin, int64_t end) {
    int64_t ties[kMaxExperts];
    for (int e = 0; e < m.experts; ++e)
      ties[e] = cuts[e].size() == 1 && begin > 0 ? 0 : cuts[e][begin / kKeyTask].ties;
    TENFOLD_ISA_CALL(delta_merge, m, begin, end, ties);
  });
}

}  // namespace tenfold::cpu
