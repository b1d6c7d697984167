// SPDX-License-Identifier: Apache-2.0
#include "core/scratch.h"

#include <sys/mman.h>

#include <cstddef>
#include <mutex>
#include <new>

namespace tenfold {
namespace {

constexpr int64_t kMostKept = int64_t{4} << 20;  // bytes of a block
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr std::align_val_t kAlign{64};

void* allocate(int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), kAlign);
}

// Whole huge pages, if the system has them to give.
void* allocate_huge(int64_t bytes) {
  void* const data = ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{kHugePage});
  madvise(data, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
  return data;
}

// What is to stay in the second cache must lie evenly in its sets, which small pages from all over
// the memory do not: a product of matrices took up to twice as long.
struct Block {
  void* data = nullptr;
  int64_t bytes = 0;
  bool used = false;

  void grow(int64_t wanted) {
    const int64_t whole = (wanted + kHugePage - 1) / kHugePage * kHugePage;
    const int64_t size = wanted > kHugePage / 4 * 3 ? whole : wanted;
    void* const larger = size >= kHugePage ? allocate_huge(size) : allocate(size);
    free();
    data = larger, bytes = size;
  }
  ~Block() { free(); }

 private:
  void free() {
    ::operator delete(data, bytes >= kHugePage ? std::align_val_t{kHugePage} : kAlign);
  }
};

// Several: a thread that shares out work also does some of it.
thread_local Block blocks[4];

Block* free_block(int64_t bytes) {
  if (bytes > kMostKept) return nullptr;
  for (Block& block : blocks)
    if (!block.used) return &block;
  return nullptr;
}

// Large blocks of the process. Those that wait for their next use hold kMostWaiting at most.
constexpr int64_t kMostWaiting = int64_t{256} << 20;
constexpr int kLarge = 16;

struct Large {
  void* data;
  int64_t bytes;
  bool used;
};

class LargeBlocks {
 public:
  // The smallest that waits and is not much too large, or a fresh one.
  void* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      Large* best = nullptr;
      for (Large& x : blocks_)
        if (x.data != nullptr && !x.used && x.bytes >= bytes && x.bytes / 2 <= bytes &&
            (best == nullptr || x.bytes < best->bytes))
          best = &x;
      if (best != nullptr) {
        best->used = true;
        waiting_ -= best->bytes;
        return best->data;
      }
    }
    const auto whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* const data = allocate_huge(whole);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Large& x : blocks_)
      if (x.data == nullptr) {
        x = {data, whole, true};
        break;
      }
    return data;
  }

  void give_back(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Large& x : blocks_) {
      if (x.data != data) continue;
      x.used = false;
      waiting_ += x.bytes;
      madvise(x.data, static_cast<std::size_t>(x.bytes), MADV_FREE);
      for (Large& old : blocks_)
        if (waiting_ > kMostWaiting && old.data != nullptr && !old.used) free(&old);
      return;
    }
    ::operator delete(data, std::align_val_t{kHugePage});  // there was no room to list it
  }

 private:
  void free(Large* x) {
    waiting_ -= x->bytes;
    ::operator delete(x->data, std::align_val_t{kHugePage});
    *x = {};
  }
  std::mutex mutex_;
  Large blocks_[kLarge] = {};
  int64_t waiting_ = 0;
};

// Never destroyed: threads may still work at exit.
LargeBlocks& large_blocks() {
  static auto* const all = new LargeBlocks;
  return *all;
}

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t kFrom = int64_t{4} << 20;
  constexpr uintptr_t kPage = kHugePage;
  if (bytes < kFrom) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

Scratch::Scratch(int64_t bytes) {
  Block* const block = free_block(bytes);
  if (block == nullptr) {
    data_ = bytes > kMostKept ? large_blocks().take(bytes) : allocate(bytes);
    large_ = bytes > kMostKept;
    return;
  }
  if (block->bytes < bytes) block->grow(bytes);
  block->used = true;
  in_use_ = &block->used;
  data_ = block->data;
}

Scratch::~Scratch() {
  if (in_use_ != nullptr) {
    *in_use_ = false;
  } else if (large_) {
    large_blocks().give_back(data_);
  } else {
    ::operator delete(data_, kAlign);
  }
}

}  // namespace tenfold
