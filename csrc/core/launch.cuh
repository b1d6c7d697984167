// SPDX-License-Identifier: Apache-2.0
// What device code may use besides plain CUDA, so that nvcc and the CPU emulation of
// tests/cuda_emu read the same kernels: one launch macro, one way to declare shared memory.
//   TENFOLD_LAUNCH(kernel, grid, block, stream, args...);
//   TENFOLD_SHARED(float, tile, 64 * 40);      // float* tile, once per block
//   TENFOLD_LAUNCH_SHARED(kernel, grid, block, bytes, most_bytes, stream, args...);
//   TENFOLD_DYNAMIC_SHARED(memory);            // char* memory: the bytes of that launch
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
// Above 48 KB a kernel must ask for its shared memory; what the device does not have is reported by
// the error check after the launch. most_bytes: the most that any launch of this kernel takes. It
// is one number for all threads, so none of them undoes what another one has asked for.
#define TENFOLD_LAUNCH_SHARED(kernel, grid, block, bytes, most_bytes, stream, ...)  \
  do {                                                                              \
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,       \
                         static_cast<int>(most_bytes));                             \
    kernel<<<(grid), (block), static_cast<size_t>(bytes), (stream)>>>(__VA_ARGS__); \
  } while (0)
#define TENFOLD_DYNAMIC_SHARED(name)                      \
  extern __shared__ __align__(128) char dynamic_shared[]; \
  char* const name = dynamic_shared

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

// Four 8x8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8; it
// gets in r[i] columns 2 (l % 4) + {0, 1} of row l / 4 of matrix i, or transposed: rows
// 2 (l % 4) + {0, 1} of column l / 4.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// 16 bytes from global to shared memory, both aligned, behind the thread's back: complete for this
// thread after the wait. !valid: zeros, `from` is not read.
__device__ inline void copy16_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void copy_commit() {  // ends a group of copies
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kGroups>
__device__ inline void copy_wait() {  // all groups of this thread but the last kGroups are there
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace tenfold::cuda
#endif
