// SPDX-License-Identifier: Apache-2.0
// What every library of emulated kernels starts with: C entry points for ctypes, and the
// conversions of their arguments. Include it after the kernels, with TENFOLD_CUDA_EMU defined
// before them; the launch code is the kernels' own.
#pragma once

#include "core/convert.cuh"
#include "core/launch.cuh"
#include "core/room.h"

namespace tenfold::cuda {
float emu_to_float(bf16_t x) {
  return to_float(x);
}
float emu_to_float(fp16_t x) {
  return to_float(x);
}
}  // namespace tenfold::cuda

using namespace tenfold;
using namespace tenfold::cuda;

#define API extern "C" __attribute__((visibility("default")))

namespace {

// An index array handed over as (pointer or null, is int64).
[[maybe_unused]] IntArray ints(const void* data, int64_t wide) {
  return {data, wide != 0, 1};
}

// The numbers are those of CODES in emu_calls.py.
template <class F>
void with_dtype(int64_t dtype, F f) {
  if (dtype == 0) f.template operator()<float>();
  if (dtype == 1) f.template operator()<bf16_t>();
  if (dtype == 2) f.template operator()<fp16_t>();
}

// Of just the size that was asked for, so that the sanitizer sees accesses beyond it.
struct Memory {
  std::vector<std::unique_ptr<char[]>> held;
  Room room() {
    return [this](int64_t bytes) {
      auto& got = held.emplace_back(new char[bytes]);
      std::memset(got.get(), 0xCD, bytes);
      return static_cast<void*>(got.get());
    };
  }
};

}  // namespace

API void emu_schedule(unsigned seed) {
  cuda_emu::machine().schedule_seed = seed;
}
