// Which are the k largest of many uint32 keys, equal ones by index, the lower first. Keys are made
// as they are read, a block at a time, mostly once: no memory for all of them is needed.
#pragma once

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

// For 0 < k < n: the cut of each task of kKeyTask keys. `micros`: of one task. `bits`: where the
// packed mask of the chosen ones goes, or null.
std::vector<Cut> find_largest(const Keys& keys, int64_t n, int64_t k, double micros, uint8_t* bits);

}  // namespace tenfold::cpu
