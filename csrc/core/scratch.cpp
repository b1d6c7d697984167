#include "core/scratch.h"

#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace tenfold {
namespace {

constexpr int64_t kMostKept = int64_t{4} << 20;  // bytes of a block
constexpr std::align_val_t kAlign{64};

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;
  bool used = false;
  ~Block() { ::operator delete(data, kAlign); }
};

// Two: a thread that shares out work also does some of it.
thread_local Block blocks[2];

void* allocate(int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), kAlign);
}

Block* free_block(int64_t bytes) {
  if (bytes > kMostKept) return nullptr;
  for (Block& block : blocks)
    if (!block.used) return &block;
  return nullptr;
}

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t kFrom = int64_t{4} << 20;
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes < kFrom) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

Scratch::Scratch(int64_t bytes) {
  Block* const block = free_block(bytes);
  if (block == nullptr) {
    data_ = allocate(bytes);
    advise_huge_pages(data_, bytes);
    return;
  }
  if (block->bytes < bytes) {
    void* const larger = allocate(bytes);
    ::operator delete(block->data, kAlign);
    block->data = larger;
    block->bytes = bytes;
  }
  block->used = true;
  in_use_ = &block->used;
  data_ = block->data;
}

Scratch::~Scratch() {
  if (in_use_ != nullptr) {
    *in_use_ = false;
  } else {
    ::operator delete(data_, kAlign);
  }
}

}  // namespace tenfold
