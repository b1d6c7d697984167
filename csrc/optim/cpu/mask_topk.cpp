// CPU registration of mask_topk and mask_random; see mask_topk.h for the method.
#include "optim/mask_topk.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "optim/masks_ops.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kTask = 1 << 16;  // keys of a task
constexpr int64_t kLeastSampled = 1 << 15;
constexpr int64_t kSamples = 1 << 13;
constexpr double kDeviations = 3.5;  // half the width of the guessed range, in standard deviations

struct Problem {
  KeySource source;
  int64_t n, k;
  uint8_t* bits;
  double micros;  // of one task
  int64_t tasks() const { return (n + kTask - 1) / kTask; }
};

// All keys above `key` and the first `ties` of those equal to it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

// Calls f(first, count, keys) for the blocks of keys of a task.
template <class F>
void for_each_block(const Problem& p, int64_t task, const F& f) {
  alignas(64) uint32_t keys[kKeyBlock];
  const int64_t end = std::min(p.n, (task + 1) * kTask);
  for (int64_t at = task * kTask; at < end; at += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end - at);
    TENFOLD_ISA_CALL(topk_keys, p.source, at, count, keys);
    f(at, count, keys);
  }
}

// -- the range that most likely holds the cut ---------------------------------------------------

KeyRange range_between(uint32_t low, uint32_t high) {
  return {low, high - low + 1};  // 0 if it is all keys
}

KeyRange guess_random(const Problem& p) {
  const double share = static_cast<double>(p.k) / static_cast<double>(p.n);
  const double spread =
      kDeviations * std::sqrt(share * (1.0 - share) / static_cast<double>(p.n)) + 1e-9;
  const auto key = [](double rank) {  // the key that a share `rank` of all keys is above
    return static_cast<uint32_t>(std::clamp((1.0 - rank) * 4294967296.0, 0.0, 4294967295.0));
  };
  return range_between(key(share + spread), key(share - spread));
}

// Positions are spread evenly, one in each of as many equal parts, where a hash says: nothing
// periodic in the scores keeps step with it.
KeyRange guess_scores(const Problem& p) {
  std::vector<int64_t> at(kSamples);
  const double part = static_cast<double>(p.n) / kSamples;
  for (int64_t j = 0; j < kSamples; ++j) {
    const auto hash = static_cast<uint32_t>(j) * 0x9E3779B9u;
    const double inside = (static_cast<double>(j) + hash * 0x1p-32) * part;
    at[j] = std::min(p.n - 1, static_cast<int64_t>(inside));
  }
  std::vector<uint32_t> keys(kSamples);
  parallel_for(kSamples / 64, 1.0, [&](int64_t begin, int64_t end) {
    TENFOLD_ISA_CALL(topk_sample, p.source, at.data() + begin * 64, (end - begin) * 64,
                     keys.data() + begin * 64);
  });
  const double share = static_cast<double>(p.k) / static_cast<double>(p.n);
  const double middle = share * kSamples;
  const double spread = kDeviations * std::sqrt(middle * (1.0 - share)) + 2.0;
  const auto rank = [&](double r) { return static_cast<int64_t>(r); };
  uint32_t high = kNanKey, low = 0;  // beyond the sample: no limit
  if (const int64_t r = rank(std::floor(middle - spread)); r >= 0) {
    std::nth_element(keys.begin(), keys.begin() + r, keys.end(), std::greater<>());
    high = keys[r];
  }
  if (const int64_t r = rank(std::ceil(middle + spread)); r < kSamples) {
    std::nth_element(keys.begin(), keys.begin() + r, keys.end(), std::greater<>());
    low = keys[r];
  }
  return range_between(low, high);
}

// -- one pass
// --------------------------------------------------------------------------------------

// What a task found inside the range: keys and positions, in order.
struct Found {
  std::vector<uint32_t> keys;
  std::vector<uint16_t> at;  // from the task's first element on
};

void set_chosen(const Problem& p, int64_t task, const Found& found, Cut cut) {
  uint8_t* const bits = p.bits + task * kTask / 8;
  for (size_t j = 0; j < found.at.size(); ++j) {
    const bool tie = found.keys[j] == cut.key && cut.ties > 0;
    if (tie) --cut.ties;
    if (tie || found.keys[j] > cut.key)
      bits[found.at[j] >> 3] |= static_cast<uint8_t>(1u << (found.at[j] & 7));
  }
}

// The cut among all keys found, of which `wanted` are to be chosen; per task, where ties are cut.
std::vector<Cut> cuts_of(const std::vector<Found>& found, int64_t total, int64_t wanted,
                         KeyRange range) {
  std::vector<Cut> cuts(found.size(), Cut{range.first + range.width - 1, 0});
  if (wanted == 0) return cuts;
  // The boundary bin first: sorting what is in it is then little work.
  const uint64_t span = range.width == 0 ? uint64_t{1} << 32 : range.width;
  int shift = 0;
  while ((span - 1) >> shift >= kKeyBins) ++shift;
  std::vector<int64_t> bins(kKeyBins);
  for (const Found& f : found)
    for (const uint32_t key : f.keys) ++bins[(key - range.first) >> shift];
  int64_t bin = kKeyBins - 1, left = wanted;
  while (bins[bin] < left) left -= bins[bin--];
  std::vector<uint32_t> inside;
  inside.reserve(std::min(total, bins[bin]));
  for (const Found& f : found)
    for (const uint32_t key : f.keys)
      if ((key - range.first) >> shift == static_cast<uint32_t>(bin)) inside.push_back(key);
  std::nth_element(inside.begin(), inside.begin() + (left - 1), inside.end(), std::greater<>());
  const uint32_t key = inside[left - 1];
  for (const uint32_t other : inside) left -= other > key ? 1 : 0;
  for (size_t task = 0; task < found.size(); ++task) {
    cuts[task] = {key, left};
    if (left > 0) left -= std::count(found[task].keys.begin(), found[task].keys.end(), key);
    left = std::max<int64_t>(left, 0);
  }
  return cuts;
}

// False if the range did not hold the cut, or too much; then the bits are garbage.
bool mark_in_one_pass(const Problem& p, KeyRange range) {
  const int64_t most = p.n / 8 + kTask;
  std::vector<Found> found(p.tasks());
  std::vector<int64_t> above(p.tasks());
  std::atomic<int64_t> total{0};
  parallel_for(p.tasks(), p.micros, [&](int64_t begin, int64_t end) {
    uint16_t at[kKeyBlock];
    for (int64_t task = begin; task < end && total.load() <= most; ++task) {
      Found& mine = found[task];
      for_each_block(p, task, [&](int64_t first, int64_t count, const uint32_t* keys) {
        const int64_t inside =
            TENFOLD_ISA_CALL(topk_mark, keys, count, range, p.bits + first / 8, &above[task], at);
        const auto offset = static_cast<uint16_t>(first - task * kTask);
        for (int64_t j = 0; j < inside; ++j) {
          mine.keys.push_back(keys[at[j]]);
          mine.at.push_back(static_cast<uint16_t>(offset + at[j]));
        }
      });
      total += static_cast<int64_t>(mine.at.size());
    }
  });
  if (total > most) return false;
  int64_t wanted = p.k;
  for (const int64_t a : above) wanted -= a;
  if (wanted < 0 || wanted > total) return false;
  const std::vector<Cut> cuts = cuts_of(found, total, wanted, range);
  parallel_for(p.tasks(), p.micros / 8.0, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) set_chosen(p, task, found[task], cuts[task]);
  });
  return true;
}

// -- radix selection
// -------------------------------------------------------------------------------

// Keys of a range counted in bins of 2^shift; a histogram of its own for every thread's tasks.
std::vector<int64_t> histogram(const Problem& p, KeyRange range, int shift) {
  std::vector<int64_t> bins(kKeyBins);
  std::atomic_flag adding = ATOMIC_FLAG_INIT;
  parallel_for(p.tasks(), p.micros, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> own(4 * kKeyBins);
    std::vector<int64_t> sums(kKeyBins);
    for (int64_t task = begin; task < end; ++task) {
      for_each_block(p, task, [&](int64_t, int64_t count, const uint32_t* keys) {
        TENFOLD_ISA_CALL(topk_histogram, keys, count, range, shift, own.data());
      });
      for (int i = 0; i < 4 * kKeyBins; ++i) sums[i % kKeyBins] += std::exchange(own[i], 0);
    }
    while (adding.test_and_set(std::memory_order_acquire)) {
    }
    for (int i = 0; i < kKeyBins; ++i) bins[i] += sums[i];
    adding.clear(std::memory_order_release);
  });
  return bins;
}

void mark_by_radix(const Problem& p) {
  KeyRange range{0, 0};
  int64_t wanted = p.k, in_bin = p.n;
  for (int shift : {21, 10, 0}) {
    const std::vector<int64_t> bins = histogram(p, range, shift);
    int64_t bin = kKeyBins - 1;
    while (bins[bin] < wanted) wanted -= bins[bin--];
    in_bin = bins[bin];
    range = {range.first + (static_cast<uint32_t>(bin) << shift), 1u << shift};
  }
  std::vector<int64_t> ties(p.tasks(), in_bin);  // that are left to each task
  if (in_bin > wanted) {
    parallel_for(p.tasks(), p.micros, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        ties[task] = 0;
        for_each_block(p, task, [&](int64_t, int64_t count, const uint32_t* keys) {
          ties[task] += TENFOLD_ISA_CALL(topk_count, keys, count, range.first);
        });
      }
    });
    for (int64_t& t : ties) wanted = std::max<int64_t>(0, wanted - std::exchange(t, wanted));
  }
  parallel_for(p.tasks(), p.micros, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t left = ties[task];
      for_each_block(p, task, [&](int64_t first, int64_t count, const uint32_t* keys) {
        left = TENFOLD_ISA_CALL(topk_write, keys, count, range.first, left, p.bits + first / 8);
      });
    }
  });
}

Tensor masked_largest(const Tensor& like, Problem p) {
  const Tensor out = new_output(like, {(p.n + 7) / 8}, ScalarType::Byte);
  p.bits = data_as<uint8_t>(out);
  if (p.k == 0 || p.k == p.n) {
    std::fill_n(p.bits, out.numel(), p.k == 0 ? uint8_t{0} : uint8_t{0xFF});
    if (p.k != 0 && p.n % 8 != 0) p.bits[p.n / 8] = static_cast<uint8_t>((1 << (p.n % 8)) - 1);
    return out;
  }
  if (p.n >= kLeastSampled) {
    const KeyRange range = p.source.score == nullptr ? guess_random(p) : guess_scores(p);
    if (mark_in_one_pass(p, range)) return out;
  }
  mark_by_radix(p);
  return out;
}

Tensor mask_topk_op(Tensor score_in, double fraction) {
  const int64_t k = check_mask_topk(score_in, fraction);
  const Tensor score = torch::stable::contiguous(score_in);
  const Dtype dtype = to_dtype(score.scalar_type());
  return masked_largest(score, {{score.data_ptr(), dtype, 0, 0, 0, 0},
                                score.numel(),
                                k,
                                nullptr,
                                dtype == Dtype::f32 ? 9.0 : 7.0});
}

Tensor mask_random_op(Tensor like, int64_t n, double fraction, int64_t seed, int64_t stream) {
  const int64_t k = check_mask_random(n, fraction);
  const KeySource source = random_source(seed, stream);
  return masked_largest(like, {source, n, k, nullptr, 40.0});
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("mask_topk", TORCH_BOX(&tenfold::cpu::mask_topk_op));
  m.impl("mask_random", TORCH_BOX(&tenfold::cpu::mask_random_op));
}
