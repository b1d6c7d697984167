#include "core/scratch.h"

#include <cstddef>
#include <new>

namespace tenfold {
namespace {

constexpr int64_t kMostKept = int64_t{4} << 20;  // bytes per thread
constexpr std::align_val_t kAlign{64};

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;
  bool used = false;
  ~Block() { ::operator delete(data, kAlign); }
};

thread_local Block block;

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr), kept_(!block.used && bytes <= kMostKept) {
  if (!kept_) {
    data_ = ::operator new(static_cast<std::size_t>(bytes), kAlign);
    return;
  }
  if (block.bytes < bytes) {
    void* larger = ::operator new(static_cast<std::size_t>(bytes), kAlign);
    ::operator delete(block.data, kAlign);
    block.data = larger;
    block.bytes = bytes;
  }
  block.used = true;
  data_ = block.data;
}

Scratch::~Scratch() {
  if (kept_) {
    block.used = false;
  } else {
    ::operator delete(data_, kAlign);
  }
}

}  // namespace tenfold
