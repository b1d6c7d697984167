// Working memory of a CPU kernel: 64-byte aligned bytes that a thread keeps from call to call.
// Fresh pages cost about a microsecond each, which is more than the small kernels themselves.
#pragma once

#include <cstdint>

namespace tenfold {

class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  bool kept_;  // the thread's own block, else a block of this object
};

}  // namespace tenfold
