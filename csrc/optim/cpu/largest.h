// SPDX-License-Identifier: Apache-2.0
// Which are the k largest of many uint32 keys, equal ones by index, the lower first. Keys are made
// as they are read, a block at a time, mostly once: no memory for all of them is needed.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "optim/mask_topk.h"

namespace tenfold::cpu {

constexpr int64_t kKeyTask = 1 << 16;  // keys of a task

class Keys {
 public:
  // Keys of the elements [begin, begin + n), n <= kKeyBlock, begin a multiple of 64; `keys` has
  // room for a multiple of 64.
  virtual void block(int64_t begin, int64_t n, uint32_t* keys) const = 0;
  // keys[j] = the key of element at[j].
  virtual void sample(const int64_t* at, int64_t n, uint32_t* keys) const = 0;
  // Every key is as likely as any other: no sample is needed.
  virtual bool uniform() const { return false; }

 protected:
  ~Keys() = default;
};

// All keys above `key` and the first `ties` of those equal to it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

// Counts of kKeyBins bins, of one thread or of all.
class KeyBins {
 public:
  void add(const KeyBins& other);
  int64_t& operator[](int64_t bin) { return counts_[bin]; }
  // The bin of the wanted-th largest, which becomes its rank inside the bin.
  int64_t find(int64_t* wanted) const;

 private:
  std::vector<int64_t> counts_ = std::vector<int64_t>(kKeyBins);
  std::atomic_flag adding_ = ATOMIC_FLAG_INIT;
};

// By which keys of a range are shifted to be its bins.
int bin_shift(KeyRange range);

// The cut of each task, from its keys inside a range and the bins of all of them: the wanted-th
// largest, 0 < wanted. `micros`: of one task.
std::vector<Cut> cuts_inside(KeyRange range, const std::vector<std::vector<uint32_t>>& inside,
                             const KeyBins& bins, int64_t wanted, double micros);

// For 0 < k < n: the cut of each task of kKeyTask keys. `micros`: of one task. `bits`: where the
// packed mask of the chosen ones goes, or null.
std::vector<Cut> find_largest(const Keys& keys, int64_t n, int64_t k, double micros, uint8_t* bits);

}  // namespace tenfold::cpu
