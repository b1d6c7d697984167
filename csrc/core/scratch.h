// SPDX-License-Identifier: Apache-2.0
// Working memory of a CPU kernel: 64-byte aligned bytes that are kept from call to call, up to 4 MB
// by each thread and larger ones by the process. Fresh pages cost about a microsecond each, in a
// virtual machine up to a millisecond per megabyte: more than many a kernel itself. Large memory
// that is not in use may be taken back by the kernel at any time (MADV_FREE).
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
  bool* in_use_ = nullptr;  // mark of the thread's block; null: its own, or the process's
  bool large_ = false;
};

}  // namespace tenfold
