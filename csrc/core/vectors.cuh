// SPDX-License-Identifier: Apache-2.0
// Neighbouring elements of a row as floats, in wide loads and stores where the address allows it.
#pragma once

#include "core/convert.cuh"

namespace tenfold::cuda {

template <class T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ inline void to_floats(const uint4& words, float (&x)[kPerVector<T>]) {
  T raw[kPerVector<T>];
  memcpy(raw, &words, sizeof(words));
#pragma unroll
  for (int k = 0; k < kPerVector<T>; ++k) x[k] = to_float(raw[k]);
}

template <class T>
__device__ inline uint4 from_floats(const float (&x)[kPerVector<T>]) {
  uint4 words;
  if constexpr (sizeof(T) == 2) {
    words = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
             pack2<T>(x[6], x[7])};
  } else {
    memcpy(&words, x, sizeof(words));
  }
  return words;
}

// Bytes that a load of kN elements takes at once.
template <class T, int kN>
constexpr int kWideBytes = kN * static_cast<int>(sizeof(T)) % 16 == 0 ? 16 : 8;

// Rows of n elements, `stride` apart, whose wide loads of kN elements are aligned.
template <class T, int kN>
inline bool wide_rows(const void* data, int64_t stride, int64_t n) {
  constexpr int64_t kBytes = kWideBytes<T, kN>, kSize = sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % kBytes == 0 && stride * kSize % kBytes == 0 &&
         n % kN == 0;
}

// p[0 .. kN), of which n exist; the others are `rest`. wide: p is aligned to kWideBytes.
template <class T, int kN>
__device__ inline void load_some(const T* p, int64_t n, bool wide, float (&x)[kN],
                                 float rest = 0.0f) {
  static_assert(kN * sizeof(T) % 8 == 0);
  // Both ways end in the words of memory: fewer registers than the floats.
  T raw[kN];
  if (wide && n >= kN) {
    if constexpr (kWideBytes<T, kN> == 16) {
      constexpr int kVectors = kN / kPerVector<T>;
      uint4 words[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) words[v] = reinterpret_cast<const uint4*>(p)[v];
      memcpy(raw, words, sizeof(raw));
    } else {
      const uint64_t words = *reinterpret_cast<const uint64_t*>(p);
      memcpy(raw, &words, sizeof(raw));
    }
  } else {
    T none;
    from_float(rest, &none);
#pragma unroll
    for (int k = 0; k < kN; ++k) raw[k] = k < n ? p[k] : none;
  }
#pragma unroll
  for (int k = 0; k < kN; ++k) x[k] = to_float(raw[k]);
}

template <class T, int kN>
__device__ inline void store_some(const float (&x)[kN], T* p, int64_t n, bool wide) {
  static_assert(kN * sizeof(T) % 8 == 0);
  if (wide && n >= kN) {
    uint32_t words[kN * sizeof(T) / 4];
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < kN; k += 2) words[k / 2] = pack2<T>(x[k], x[k + 1]);
    } else {
      memcpy(words, x, sizeof(words));
    }
    if constexpr (kWideBytes<T, kN> == 16) {
#pragma unroll
      for (int w = 0; w < kN * static_cast<int>(sizeof(T)) / 4; w += 4)
        reinterpret_cast<uint4*>(p)[w / 4] = {words[w], words[w + 1], words[w + 2], words[w + 3]};
    } else {
      uint64_t both;
      memcpy(&both, words, sizeof(both));
      *reinterpret_cast<uint64_t*>(p) = both;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kN; ++k)
    if (k < n) from_float(x[k], p + k);
}

}  // namespace tenfold::cuda
