// Working memory of a CPU kernel: 64-byte aligned bytes that a thread keeps from call to call.
// Fresh pages cost about a microsecond each, which is more than the small kernels themselves.
#pragma once

#include <cstdint>

namespace tenfold {

// Advises fresh memory of 4 MB and more to huge pages: first-touch page faults otherwise cost more
// than a memory-bound kernel.
void advise_huge_pages(void* data, int64_t bytes);

class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  bool* in_use_ = nullptr;  // mark of the thread's block; null: the memory is this object's own
};

}  // namespace tenfold
