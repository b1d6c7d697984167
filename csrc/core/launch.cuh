// What device code may use besides plain CUDA, so that nvcc and the CPU emulation of
// tests/cuda_emu read the same kernels: one launch macro, one way to declare shared memory.
//   TENFOLD_LAUNCH(kernel, grid, block, stream, args...);
//   TENFOLD_SHARED(float, tile, 64 * 40);      // float* tile, once per block
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/types.h"

#if defined(TENFOLD_CUDA_EMU)
#include "cuda_emu.h"
#else
#include <cuda_runtime.h>

#define TENFOLD_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#define TENFOLD_SHARED(type, name, count)            \
  __shared__ alignas(16) type name##_storage[count]; \
  type* const name = name##_storage

namespace tenfold::cuda {

// D += A * B for one warp: A 16x16 (row), B 16x8 (col), D 16x8, two 16-bit values a register.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_m16n8k16<bf16_t>(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma_m16n8k16<fp16_t>(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace tenfold::cuda
#endif
