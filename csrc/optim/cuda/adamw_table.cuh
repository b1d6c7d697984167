// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of both AdamW ops share: the scalar operations of the rule, the table of
// tensors, and the kernel that advances the steps.
//
// The table travels in the kernel's arguments (32,764 bytes are allowed): no copy to the device
// that would have to outlive the call or break a graph capture, and one launch for as many tensors
// as a model of billions of parameters has. A longer list takes several launches.
#pragma once

#include "core/convert.cuh"
#include "core/philox.h"
#include "optim/masked_adamw_8bit.h"

namespace tenfold::cuda {

// Operations that are rounded one by one: nvcc would contract a * b + c.
struct FloatOps {
  using F = float;
  using Flag = bool;
  TENFOLD_HD bool flag(bool x) { return x; }
  TENFOLD_HD float choose(bool which, float a, float b) { return which ? a : b; }
  TENFOLD_HD float set1(float x) { return x; }
#if defined(__CUDA_ARCH__)
  TENFOLD_HD float add(float a, float b) { return __fadd_rn(a, b); }
  TENFOLD_HD float sub(float a, float b) { return __fsub_rn(a, b); }
  TENFOLD_HD float mul(float a, float b) { return __fmul_rn(a, b); }
  TENFOLD_HD float div(float a, float b) { return __fdiv_rn(a, b); }
  TENFOLD_HD float sqrt(float a) { return __fsqrt_rn(a); }
  TENFOLD_HD float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
  TENFOLD_HD float add(float a, float b) { return a + b; }
  TENFOLD_HD float sub(float a, float b) { return a - b; }
  TENFOLD_HD float mul(float a, float b) { return a * b; }
  TENFOLD_HD float div(float a, float b) { return a / b; }
  TENFOLD_HD float sqrt(float a) { return sqrtf(a); }
  TENFOLD_HD float fma(float a, float b, float c) { return fmaf(a, b, c); }
#endif
  TENFOLD_HD float fma_from(float c, float a, float b) { return fma(-a, b, c); }
  TENFOLD_HD float finite(float q, float otherwise) { return q < INFINITY ? otherwise : q; }
};

// lr on either side.
struct LearningRate {
  const void* data = nullptr;  // on the device; null: the value in the options
  int kind = 0;                // 0: double, 1: float32, 2: bfloat16, 3: float16

  TENFOLD_HD_MEMBER double read() const {
    if (kind == 0) return *static_cast<const double*>(data);
    if (kind == 1) return *static_cast<const float*>(data);
    if (kind == 2) return to_float(*static_cast<const bf16_t*>(data));
    return to_float(*static_cast<const fp16_t*>(data));
  }
};

// Scalars on the device, each may be null.
struct AdamwInputs {
  LearningRate lr;
  const float *grad_scale = nullptr, *found_inf = nullptr, *clip_coef = nullptr;
};

constexpr int kAdamwThreads = 256;
constexpr int kAdamwSteps = 3072;  // 24 KB of pointers

struct AdamwSteps {
  int count;
  float* step[kAdamwSteps];
};

// Before the update: steps advance (unless found_inf), and every tensor gets its scalars.
static __global__ void __launch_bounds__(kAdamwThreads)
    adamw_advance_kernel(const __grid_constant__ AdamwSteps steps, const AdamwOptions options,
                         const AdamwInputs in, AdamwScalars* out) {
  const int i = static_cast<int>(blockIdx.x) * kAdamwThreads + static_cast<int>(threadIdx.x);
  if (i >= steps.count) return;
  const bool skips = in.found_inf != nullptr && *in.found_inf != 0.0f;
  if (!skips) *steps.step[i] += 1.0f;
  AdamwOptions o = options;
  if (in.lr.data != nullptr) o.lr = in.lr.read();
  AdamwScalars s = adamw_scalars(o, *steps.step[i], in.grad_scale ? *in.grad_scale : 1.0f,
                                 in.clip_coef ? *in.clip_coef : 1.0f);
  s.skips = skips;
  out[i] = s;
}

// Tensors of one launch. Block b works on chunk b - first_chunk[i] of the last tensor i that has
// first_chunk[i] <= b.
template <class T>
struct AdamwTable {
  static constexpr int kTensors = 216;
  int count;
  int first_chunk[kTensors + 1];
  int scalars[kTensors];  // of the tensor
  T tensor[kTensors];
};
static_assert(sizeof(AdamwTable<Adamw8Tensor>) + 512 <= 32764);

template <class T>
__device__ inline int find_tensor(const AdamwTable<T>& table, int chunk) {
  int low = 0, high = table.count;  // low: its first chunk is not after; high: it is
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Bit k: element i + k trains; k < n <= 8.
__device__ inline uint32_t trained_bits(const Mask& mask, int64_t i, int n) {
  if (mask.kind == MaskKind::none) return (1u << n) - 1;
  if (mask.kind == MaskKind::element && i % 8 == 0) return mask.bits[i / 8] & ((1u << n) - 1);
  const bool units = mask.kind == MaskKind::row || mask.kind == MaskKind::block;
  int64_t unit = i, left = 1;  // of the current element; elements until the next unit
  if (units) unit = i / mask.inner, left = mask.inner - i % mask.inner;
  if (mask.kind == MaskKind::col) unit = i % mask.inner;
  uint32_t bits = 0;
  for (int k = 0; k < n; ++k) {
    bits |= static_cast<uint32_t>(mask_bit(mask.bits, unit)) << k;
    if (--left > 0) continue;
    left = units ? mask.inner : 1;
    if (++unit == mask.inner && mask.kind == MaskKind::col) unit = 0;
    if (k + 1 == n) break;
  }
  return bits;
}

// N values that move together where the address allows it.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T x[N];
};

template <class T, int N>
__device__ inline Pack<T, N> load_pack(const T* from, int n, bool whole) {
  if (whole) return *reinterpret_cast<const Pack<T, N>*>(from);
  Pack<T, N> pack{};
  for (int k = 0; k < N; ++k)
    if (k < n) pack.x[k] = from[k];
  return pack;
}

template <class T, int N>
__device__ inline void store_pack(T* to, const Pack<T, N>& pack, int n, bool whole) {
  if (whole) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
    return;
  }
  for (int k = 0; k < N; ++k)
    if (k < n) to[k] = pack.x[k];
}

TENFOLD_HD bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

TENFOLD_HD float scaled_gradient(const AdamwScalars& s, float g) {
  const float x = s.divides ? FloatOps::div(g, s.divisor) : FloatOps::mul(g, s.divisor);
  return FloatOps::mul(x, s.factor);
}

// The 16 random bits of elements i .. i + 7, i a multiple of 8: see philox.h.
TENFOLD_HD Philox4 rounding_noise(uint64_t seed, const AdamwScalars& s, uint32_t id, int64_t i) {
  const auto counter = static_cast<uint64_t>(i) >> 3;
  return philox4x32_10(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), id,
                       s.count, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

TENFOLD_HD float round_stochastic(float x, uint32_t noise) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return x;
  return bits_to_float((bits + noise) & 0xFFFF0000u);
}

// Fills tables of at most kTensors and calls launch(table, chunks) for each. `at[j]`: which tensor
// of the call tensors[j] is.
template <class T, class F>
void for_each_table(const T* const* tensors, const int* at, int64_t count, int64_t chunk,
                    const F& launch) {
  AdamwTable<T> table;
  table.count = 0;
  int64_t chunks = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    table.first_chunk[table.count] = static_cast<int>(chunks);
    launch(table, chunks);
    table.count = 0, chunks = 0;
  };
  for (int64_t j = 0; j < count; ++j) {
    const int64_t more = (tensors[j]->numel + chunk - 1) / chunk;
    if (more == 0) continue;
    if (table.count == AdamwTable<T>::kTensors || chunks + more >= int64_t{1} << 31) flush();
    table.first_chunk[table.count] = static_cast<int>(chunks);
    table.scalars[table.count] = at[j];
    table.tensor[table.count++] = *tensors[j];
    chunks += more;
  }
  flush();
}

inline void launch_adamw_advance(float* const* steps, int64_t count, const AdamwOptions& o,
                                 const AdamwInputs& in, AdamwScalars* out, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kAdamwSteps) {
    AdamwSteps table;
    table.count = static_cast<int>(count - first < kAdamwSteps ? count - first : kAdamwSteps);
    for (int i = 0; i < table.count; ++i) table.step[i] = steps[first + i];
    const auto blocks = static_cast<unsigned>((table.count + kAdamwThreads - 1) / kAdamwThreads);
    TENFOLD_LAUNCH(adamw_advance_kernel, blocks, kAdamwThreads, stream, table, o, in, out + first);
  }
}

}  // namespace tenfold::cuda
