// SPDX-License-Identifier: Apache-2.0
// Test-only emulation of the CUDA execution model on the host, so that g++ runs the same kernels.
//
// Blocks run one after another; the threads of a block are fibers, resumed in a seeded random order
// between barriers, so that a missing barrier shows as a wrong or schedule-dependent result. Shared
// memory is a fresh heap block per (kernel block, declaration), filled with 0xCD: unwritten reads
// give garbage, and with ASan accesses outside it are reported. A barrier that not all threads of
// the block reach, or that they reach at different lines, aborts with a message.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "core/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

// What switches, waits and schedules runs a million times a second: without the sanitizers, which
// are there for the kernels.
#define CUDA_EMU_OWN __attribute__((no_sanitize("address", "undefined"), optimize("O2"))) inline

namespace cuda_emu {

enum class State { ready, block_barrier, warp_barrier, done };

constexpr size_t kStackBytes = 128 << 10;

// Saves the registers that a call preserves on this stack and its pointer in *from, and goes on
// with the stack `to`. swapcontext would ask the kernel for the signal mask, each time.
#if defined(__x86_64__)
extern "C" void cuda_emu_switch(void** from, void* to);
asm(R"(
.text
.type cuda_emu_switch, @function
cuda_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emu_switch, . - cuda_emu_switch
)");

// A stack whose first switch calls `entry`, which never returns.
inline void* first_frame(char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~15);
  *--top = nullptr;  // where entry would return to: calls leave the pointer 8 off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  return top;
}
#else
#error "the emulation switches stacks on x86-64 only"
#endif

struct Copy {
  void* to;
  const void* from;  // null: zeros
  unsigned group;
};

struct Fiber {
  char* stack = nullptr;
  void* pointer = nullptr;  // into the stack, while others run
  State state = State::ready;
  int barrier_line = 0;
  uint64_t slot[2] = {};  // values offered to the warp
  unsigned turn = 0;  // warp instructions so far: their buffers alternate, so one barrier is enough
  std::vector<Copy> copies;  // asynchronous ones that have not landed
  unsigned groups = 0;       // committed
  void* fake_stack = nullptr;
};

constexpr int kMostThreads = 1024;

// They live on from block to block, and never move.
struct Fibers {
  Fiber* at[kMostThreads] = {};
  int count = 0;
  Fiber& operator[](int i) { return *at[i]; }
};

struct Machine {
  unsigned schedule_seed = 1;
  dim3 grid, block, block_index;
  int current = -1;
  Fibers fibers;
  std::map<int, std::vector<char>*> shared;
  size_t dynamic_bytes = 0;
  std::function<void()> body;
  void* scheduler = nullptr;
  void* scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::string error;
};

inline Machine the_machine;
inline Machine& machine() {
  return the_machine;
}

// SplitMix64: a generator that is begun anew for every block.
struct Random {
  uint64_t state;
  CUDA_EMU_OWN uint32_t operator()() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>(z >> 32);
  }
};

[[noreturn]] inline void fail(const std::string& text) {
  std::fprintf(stderr, "cuda_emu: %s\n", text.c_str());
  std::exit(86);
}

inline void land(const Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

// -- switching
// ---------------------------------------------------------------------------------------

CUDA_EMU_OWN void to_scheduler() {
  Machine& m = the_machine;
  Fiber& f = *m.fibers.at[m.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f.fake_stack, m.scheduler_stack, m.scheduler_size);
#endif
  cuda_emu_switch(&f.pointer, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &m.scheduler_stack, &m.scheduler_size);
#endif
}

// A thread of every block to come.
inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_size);
#endif
  for (;;) {
    m.body();
    m.fibers[m.current].state = State::done;
    to_scheduler();
  }
}

CUDA_EMU_OWN void resume(int index) {
  Machine& m = the_machine;
  m.current = index;
  Fiber& f = *m.fibers.at[index];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.scheduler_fake, f.stack, kStackBytes);
#endif
  cuda_emu_switch(&m.scheduler, f.pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.scheduler_fake, nullptr, nullptr);
#endif
}

// -- barriers
// ----------------------------------------------------------------------------------------

CUDA_EMU_OWN void wait(State state, int line) {
  Fiber& f = *the_machine.fibers.at[the_machine.current];
  f.state = state;
  f.barrier_line = line;
  to_scheduler();
}

[[noreturn]] inline void fail_apart(int line, int other) {
  fail("divergent barrier: threads wait at lines " + std::to_string(line) + " and " +
       std::to_string(other));
}
[[noreturn]] inline void fail_without(int done, int waiting, int line) {
  fail("divergent barrier: " + std::to_string(done) + " threads have left, " +
       std::to_string(waiting) + " wait at line " + std::to_string(line));
}

// Releases the threads [first, last) if all of them wait in `state`; checks that lines agree.
CUDA_EMU_OWN bool release(int first, int last, State state) {
  Fiber* const* const fibers = the_machine.fibers.at;
  int line = 0, waiting = 0, done = 0;
  for (int i = first; i < last; ++i) {
    done += fibers[i]->state == State::done;
    if (fibers[i]->state != state) continue;
    ++waiting;
    if (line == 0) line = fibers[i]->barrier_line;
    if (line != fibers[i]->barrier_line) fail_apart(line, fibers[i]->barrier_line);
  }
  if (waiting == 0 || waiting + done < last - first) return false;
  if (done > 0) fail_without(done, waiting, line);
  for (int i = first; i < last; ++i) fibers[i]->state = State::ready;
  return true;
}

// Of a block, in bytes: what is declared, and that with the dynamic memory (of sm_90).
constexpr size_t kMostDeclared = 48 << 10, kMostShared = 227 << 10;

// What a device refuses to launch, or ptxas to compile.
inline void check_launch(dim3 grid, dim3 block) {
  if (grid.x == 0 || grid.x > INT32_MAX || block.x == 0 || block.x > kMostThreads)
    fail("invalid launch: " + std::to_string(grid.x) + " blocks of " + std::to_string(block.x));
}

inline void free_shared() {
  size_t declared = 0, all = 0;
  for (const auto& [id, memory] : machine().shared) {
    all += memory->size();
    if (id >= 0) declared += memory->size();
    delete memory;
  }
  machine().shared.clear();
  if (declared > kMostDeclared || all > kMostShared)
    fail("too much shared memory: " + std::to_string(declared) + " bytes declared, " +
         std::to_string(all) + " in all");
}

inline void begin_block(int count) {
  Fibers& fibers = machine().fibers;
  while (fibers.count < count) {
    auto* const f = fibers.at[fibers.count++] = new Fiber;
    f->stack = new char[kStackBytes];
    f->pointer = first_frame(f->stack, fiber_main);
  }
  for (int i = 0; i < count; ++i) {
    Fiber& f = fibers[i];
    f.state = State::ready;
    f.turn = f.groups = 0;
    f.copies.clear();
  }
}

CUDA_EMU_OWN void resume_all(int* threads, int n, Random* random) {
  for (int i = n; i > 1; --i) {
    const uint32_t other = (*random)() % static_cast<uint32_t>(i);
    const int moved = threads[i - 1];
    threads[i - 1] = threads[other];
    threads[other] = moved;
  }
  for (int i = 0; i < n; ++i) resume(threads[i]);
}

CUDA_EMU_OWN void run_threads(int count, Random random) {
  Fiber* const* const fibers = the_machine.fibers.at;
  int ready[kMostThreads];
  for (;;) {
    int n = 0, done = 0;
    for (int i = 0; i < count; ++i) {
      if (fibers[i]->state == State::ready) ready[n++] = i;
      done += fibers[i]->state == State::done;
    }
    if (done == count) return;
    if (n == 0) {
      bool moved = false;
      for (int w = 0; w < count; w += 32)
        moved |= release(w, w + 32 < count ? w + 32 : count, State::warp_barrier);
      if (!moved) moved = release(0, count, State::block_barrier);
      if (!moved) fail("deadlock: threads wait at different barriers");
      continue;
    }
    // Half of the time one warp runs alone, until only a block barrier holds it: warps drift apart.
    if (random() % 2 == 0) {
      resume_all(ready, n, &random);
      continue;
    }
    const int first = ready[random() % static_cast<uint32_t>(n)] / 32 * 32;
    const int last = first + 32 < count ? first + 32 : count;
    int some = 0;
    for (int i = 0; i < n; ++i)
      if (ready[i] >= first && ready[i] < last) ready[some++] = ready[i];
    resume_all(ready, some, &random);
    while (release(first, last, State::warp_barrier)) {
      for (int i = first; i < last; ++i) ready[i - first] = i;
      resume_all(ready, last - first, &random);
    }
  }
}

inline void run_block() {
  const Machine& m = machine();
  const int count = static_cast<int>(m.block.x);
  begin_block(count);
  run_threads(count, Random{m.schedule_seed * 0x100000001u + m.block_index.x});
  free_shared();
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t dynamic_bytes, Args... args) {
  check_launch(grid, block);
  Machine& m = machine();
  m.dynamic_bytes = dynamic_bytes;
  m.grid = grid;
  m.block = block;
  m.body = [=] { kernel(args...); };
  for (unsigned b = 0; b < grid.x; ++b) {
    m.block_index = dim3(b, 0, 0);
    run_block();
  }
}

// -- what kernels see
// ----------------------------------------------------------------------------------

inline void* shared(int id, size_t bytes) {
  auto& slot = machine().shared[id];
  if (slot == nullptr) slot = new std::vector<char>(bytes, static_cast<char>(0xCD));
  return slot->data();
}

struct Index {
  struct Thread {
    operator unsigned() const { return static_cast<unsigned>(machine().current); }
  } x;
};
struct BlockIndex {
  struct X {
    operator unsigned() const { return machine().block_index.x; }
  } x;
};
struct Extent {
  bool of_grid;
  struct X {
    bool of_grid;
    operator unsigned() const { return of_grid ? machine().grid.x : machine().block.x; }
  } x;
};

// Where this thread's value of a warp instruction goes, and those of its warp are: [turn].
struct Offer {
  Fiber* const* warp;
  unsigned turn;
};
CUDA_EMU_OWN Offer offer(uint64_t value) {
  Machine& m = the_machine;
  Fiber& f = *m.fibers.at[m.current];
  const unsigned turn = f.turn++ % 2;
  f.slot[turn] = value;
  return {m.fibers.at + m.current / 32 * 32, turn};
}

template <class T>
T exchange(T value, int from, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  const Offer all = offer(bits);
  wait(State::warp_barrier, line);
  T got;
  __builtin_memcpy(&got, &all.warp[from]->slot[all.turn], sizeof(T));
  return got;
}

CUDA_EMU_OWN unsigned ballot(bool yes, int line) {
  const Offer all = offer(yes);
  wait(State::warp_barrier, line);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(all.warp[i]->slot[all.turn] & 1) << i;
  return bits;
}

}  // namespace cuda_emu

inline const cuda_emu::Index threadIdx{};
inline const cuda_emu::BlockIndex blockIdx{};
inline const cuda_emu::Extent blockDim{false, {false}}, gridDim{true, {true}};

#define __syncthreads() cuda_emu::wait(cuda_emu::State::block_barrier, __LINE__)
#define __syncwarp(...) cuda_emu::wait(cuda_emu::State::warp_barrier, __LINE__)
#define __shfl_xor_sync(mask, value, lane) \
  cuda_emu::exchange((value), static_cast<int>((threadIdx.x % 32) ^ (lane)), __LINE__)
#define __shfl_sync(mask, value, lane) cuda_emu::exchange((value), (lane), __LINE__)
#define __ballot_sync(mask, yes) cuda_emu::ballot((yes), __LINE__)

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T, class U>
T atomicAdd(T* at, U value) {
  const T before = *at;
  *at = before + static_cast<T>(value);
  return before;
}
template <class T, class U>
T atomicMax(T* at, U value) {
  const T before = *at;
  if (static_cast<T>(value) > before) *at = static_cast<T>(value);
  return before;
}

#define TENFOLD_LAUNCH(kernel, grid, block, stream, ...) \
  cuda_emu::launch(kernel, dim3(grid), dim3(block), 0, __VA_ARGS__)
#define TENFOLD_LAUNCH_SHARED(kernel, grid, block, bytes, most_bytes, stream, ...)  \
  do {                                                                              \
    if ((bytes) > (most_bytes)) cuda_emu::fail("more shared memory than the most"); \
    cuda_emu::launch(kernel, dim3(grid), dim3(block), (bytes), __VA_ARGS__);        \
  } while (0)
#define TENFOLD_DYNAMIC_SHARED(name) \
  char* const name = static_cast<char*>(cuda_emu::shared(-1, cuda_emu::machine().dynamic_bytes))
#define TENFOLD_SHARED(type, name, count) \
  type* const name = static_cast<type*>(cuda_emu::shared(__COUNTER__, sizeof(type) * (count)))

namespace tenfold::cuda {

float emu_to_float(bf16_t x);
float emu_to_float(fp16_t x);

// The fragments of mma.m16n8k16: lane l holds rows l/4 and l/4 + 8, columns (l%4)*2 + {0, 1} (+ 8).
template <class T>
CUDA_EMU_OWN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float a[16][16], b[8][16];
  };
  static Operands operands[32][2];  // [warp][turn]
  const unsigned thread = threadIdx.x;
  const int me = static_cast<int>(thread % 32), row = me / 4, col = me % 4 * 2;
  Operands& now = operands[thread / 32][cuda_emu::machine().fibers[thread].turn++ % 2];
  for (int i = 0; i < 2; ++i) {
    for (int half = 0; half < 2; ++half) {
      now.a[row + 8 * half][col + i] = emu_to_float(T{static_cast<uint16_t>(a[half] >> (16 * i))});
      now.a[row + 8 * half][col + 8 + i] =
          emu_to_float(T{static_cast<uint16_t>(a[2 + half] >> (16 * i))});
      now.b[row][col + 8 * half + i] = emu_to_float(T{static_cast<uint16_t>(b[half] >> (16 * i))});
    }
  }
  cuda_emu::wait(cuda_emu::State::warp_barrier, 1000001);
  const float *x = now.a[row], *lower = now.a[row + 8], *y = now.b[col], *right = now.b[col + 1];
  float sums[4] = {d[0], d[1], d[2], d[3]};
  for (int k = 0; k < 16; ++k) {
    sums[0] += x[k] * y[k], sums[1] += x[k] * right[k];
    sums[2] += lower[k] * y[k], sums[3] += lower[k] * right[k];
  }
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

CUDA_EMU_OWN void emu_load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  static uint16_t matrices[32][2][4][8][8];  // [warp][turn]
  const unsigned thread = threadIdx.x;
  const int lane = static_cast<int>(thread % 32);
  auto& now = matrices[thread / 32][cuda_emu::machine().fibers[thread].turn++ % 2];
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cuda_emu::fail("load_matrices: unaligned row");
  std::memcpy(now[lane / 8][lane % 8], row, 16);
  cuda_emu::wait(cuda_emu::State::warp_barrier, transposed ? 1000003 : 1000002);
  const int outer = lane / 4, inner = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto& m = now[i];
    const uint16_t low = transposed ? m[inner][outer] : m[outer][inner];
    const uint16_t high = transposed ? m[inner + 1][outer] : m[outer][inner + 1];
    r[i] = low | static_cast<uint32_t>(high) << 16;
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emu_load_matrices(r, row, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emu_load_matrices(r, row, true);
}

// An asynchronous copy may land at once or as late as the wait: here a draw of the schedule decides
// for each of them, so that a missing wait and a buffer refilled too early both show.
inline void copy16_async(void* to, const void* from, bool valid) {
  auto& m = cuda_emu::machine();
  auto& f = m.fibers[m.current];
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    cuda_emu::fail("copy16_async: unaligned address");
  const cuda_emu::Copy copy{to, valid ? from : nullptr, f.groups};
  if ((m.schedule_seed + f.groups + static_cast<unsigned>(m.current)) * 2654435761u >> 31) {
    f.copies.push_back(copy);
  } else {
    cuda_emu::land(copy);
  }
}

inline void copy_commit() {
  ++cuda_emu::machine().fibers[cuda_emu::machine().current].groups;
}

template <int kGroups>
inline void copy_wait() {
  auto& f = cuda_emu::machine().fibers[cuda_emu::machine().current];
  std::erase_if(f.copies, [&](const cuda_emu::Copy& copy) {
    const bool due = copy.group + kGroups < f.groups;
    if (due) cuda_emu::land(copy);
    return due;
  });
}

}  // namespace tenfold::cuda
