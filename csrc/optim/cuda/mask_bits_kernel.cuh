// SPDX-License-Identifier: Apache-2.0
// Device code of pack_mask, unpack_mask, mask_popcount and mask_prefix.
#pragma once

#include "core/scan.cuh"

namespace tenfold::cuda {

constexpr int kBitsThreads = 256;

inline unsigned grid_of(int64_t items, int64_t per_block, int64_t most = 1 << 16) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// Bit i: byte i of the word is not 0.
__device__ inline uint32_t nonzero_bytes(uint32_t x) {
  x = (x | ((x & 0x7F7F7F7Fu) + 0x7F7F7F7Fu)) >> 7 & 0x01010101u;
  return (x * 0x10204080u) >> 28;
}

// A thread packs 16 bytes; `vectors`: they are aligned.
__global__ void __launch_bounds__(kBitsThreads)
    pack_kernel(const uint8_t* bytes, int64_t n, uint8_t* bits, bool vectors) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBitsThreads * 16;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kBitsThreads + threadIdx.x) * 16; i < n;
       i += step) {
    uint32_t word = 0;
    if (vectors && i + 16 <= n) {
      const uint4 x = *reinterpret_cast<const uint4*>(bytes + i);
      word = nonzero_bytes(x.x) | nonzero_bytes(x.y) << 4 | nonzero_bytes(x.z) << 8 |
             nonzero_bytes(x.w) << 12;
    } else {
      for (int k = 0; k < 16 && i + k < n; ++k) word |= (bytes[i + k] != 0 ? 1u : 0u) << k;
    }
    bits[i / 8] = static_cast<uint8_t>(word);
    if (i + 8 < n) bits[i / 8 + 1] = static_cast<uint8_t>(word >> 8);
  }
}

// Bytes 0 and 1 of 4 bits.
__device__ inline uint32_t spread_bits(uint32_t bits) {
  return ((bits & 15u) * 0x00204081u) & 0x01010101u;
}

// A thread writes 16 bytes; the output is aligned.
__global__ void __launch_bounds__(kBitsThreads)
    unpack_kernel(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBitsThreads * 16;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kBitsThreads + threadIdx.x) * 16; i < n;
       i += step) {
    uint32_t word = bits[i / 8];
    if (i + 8 < n) word |= static_cast<uint32_t>(bits[i / 8 + 1]) << 8;
    if (i + 16 <= n) {
      const uint4 x{spread_bits(word), spread_bits(word >> 4), spread_bits(word >> 8),
                    spread_bits(word >> 12)};
      *reinterpret_cast<uint4*>(bytes + i) = x;
    } else {
      for (int k = 0; i + k < n; ++k) bytes[i + k] = static_cast<uint8_t>(word >> k & 1u);
    }
  }
}

// Set bits of `count` bytes; `vectors`: 4-byte words are aligned.
__device__ inline int64_t count_bytes(const uint8_t* bits, int64_t count, bool vectors) {
  int64_t sum = 0, i = 0;
  if (vectors)
    for (; i + 4 <= count; i += 4) sum += __popc(*reinterpret_cast<const uint32_t*>(bits + i));
  for (; i < count; ++i) sum += __popc(bits[i]);
  return sum;
}

// total starts at 0.
__global__ void __launch_bounds__(kBitsThreads)
    popcount_kernel(const uint8_t* bits, int64_t bytes, unsigned long long* total, bool vectors) {
  constexpr int64_t kPart = 16;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBitsThreads * kPart;
  int64_t sum = 0;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kBitsThreads + threadIdx.x) * kPart;
       i < bytes; i += step)
    sum += count_bytes(bits + i, bytes - i < kPart ? bytes - i : kPart, vectors);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) atomicAdd(total, static_cast<unsigned long long>(sum));
}

// A thread counts one step; prefix null: only the sums of the blocks.
__global__ void __launch_bounds__(kBitsThreads)
    prefix_kernel(const uint8_t* bits, int64_t bytes, int64_t step, int64_t steps,
                  int64_t* of_blocks, int32_t* prefix, bool vectors) {
  TENFOLD_SHARED(int64_t, sums, kBitsThreads / 32);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBitsThreads + threadIdx.x;
  int64_t count = 0;
  if (i < steps) {
    const int64_t at = i * step;
    count = count_bytes(bits + at, bytes - at < step ? bytes - at : step, vectors);
  }
  int64_t total;
  const int64_t before = block_before<kBitsThreads>(count, sums, &total);
  if (prefix == nullptr) {
    if (threadIdx.x == 0) of_blocks[blockIdx.x] = total;
  } else if (i < steps) {
    prefix[i] = static_cast<int32_t>(of_blocks[blockIdx.x] + before);
  }
}

inline bool aligned_to(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline void launch_pack(const uint8_t* bytes, int64_t n, uint8_t* bits, cudaStream_t stream) {
  if (n > 0)
    TENFOLD_LAUNCH(pack_kernel, grid_of(n, kBitsThreads * 16), kBitsThreads, stream, bytes, n, bits,
                   aligned_to(bytes, 16));
}

inline void launch_unpack(const uint8_t* bits, int64_t n, uint8_t* bytes, cudaStream_t stream) {
  if (n > 0)
    TENFOLD_LAUNCH(unpack_kernel, grid_of(n, kBitsThreads * 16), kBitsThreads, stream, bits, n,
                   bytes);
}

inline void launch_popcount(const uint8_t* bits, int64_t bytes, unsigned long long* total,
                            cudaStream_t stream) {
  if (bytes > 0)
    TENFOLD_LAUNCH(popcount_kernel, grid_of(bytes, kBitsThreads * 16, 4096), kBitsThreads, stream,
                   bits, bytes, total, aligned_to(bits, 4));
}

inline int64_t prefix_blocks(int64_t steps) {
  return (steps + kBitsThreads - 1) / kBitsThreads;
}

// of_blocks: prefix_blocks(steps) numbers of working memory.
inline void launch_prefix(const uint8_t* bits, int64_t bytes, int64_t step, int64_t steps,
                          int64_t* of_blocks, int32_t* prefix, cudaStream_t stream) {
  if (steps == 0) return;
  const auto blocks = static_cast<unsigned>(prefix_blocks(steps));
  const bool vectors = aligned_to(bits, 4);
  int32_t* const none = nullptr;
  TENFOLD_LAUNCH(prefix_kernel, blocks, kBitsThreads, stream, bits, bytes, step, steps, of_blocks,
                 none, vectors);
  launch_scan(of_blocks, prefix_blocks(steps), stream);
  TENFOLD_LAUNCH(prefix_kernel, blocks, kBitsThreads, stream, bits, bytes, step, steps, of_blocks,
                 prefix, vectors);
}

}  // namespace tenfold::cuda
