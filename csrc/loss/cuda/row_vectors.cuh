// SPDX-License-Identifier: Apache-2.0
// 16 bytes of a row of any alignment. Which elements a thread gets does not depend on where the row
// lies in memory, so neither do sums of them.
#pragma once

#include "core/vectors.cuh"

namespace tenfold::cuda {

// What weighs nothing in a softmax.
template <class T>
__device__ inline T minus_infinity() {
  T x;
  from_float(-INFINITY, &x);
  return x;
}

// Bytes [shift, shift + 16) of two neighbouring vectors.
__device__ inline uint4 shifted_pair(const uint4& low, const uint4& high, int shift) {
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int step = 2; step > 0; step /= 2)
    if ((shift / 4 & step) != 0)
#pragma unroll
      for (int i = 0; i < 8 - step; ++i) w[i] = w[i + step];
  const int bits = shift % 4 * 8;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w[i] = static_cast<uint32_t>((static_cast<uint64_t>(w[i + 1]) << 32 | w[i]) >> bits);
  return {w[0], w[1], w[2], w[3]};
}

// The n elements of a row, read in vectors that start at elements `first`, `first` + kPerVector,
// ...
template <class T>
struct RowVectors {
  static constexpr int kPer = kPerVector<T>;
  const T* row;
  int64_t n;
  int shift;  // bytes by which such a vector lies behind an aligned one

  __device__ RowVectors(const T* row, int64_t n, int64_t first) : row(row), n(n) {
    const auto address =
        reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(first) * sizeof(T);
    shift = static_cast<int>(address % 16);
  }

  // Vectors at elements i, i + step, ..., where i may be negative; -inf where there is no element.
  template <int kCount>
  __device__ void load(int64_t i, int64_t step, uint4 (&to)[kCount]) const {
    if (shift == 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j, i += step) {
        if (i >= 0 && i + kPer <= n) {
          to[j] = *reinterpret_cast<const uint4*>(row + i);
        } else {
          to[j] = by_element(i);
        }
      }
      return;
    }
    constexpr int kTogether = 4;
    static_assert(kCount % kTogether == 0);
    const int before = shift / static_cast<int>(sizeof(T));
#pragma unroll
    for (int j = 0; j < kCount; j += kTogether) {
      uint4 low[kTogether], high[kTogether];
#pragma unroll
      for (int l = 0; l < kTogether; ++l) {
        const int64_t at = i + (j + l) * step - before;
        low[l] = high[l] = uint4{};
        if (at >= 0 && at + 2 * kPer <= n) {
          low[l] = *reinterpret_cast<const uint4*>(row + at);
          high[l] = *reinterpret_cast<const uint4*>(row + at + kPer);
        }
      }
#pragma unroll
      for (int l = 0; l < kTogether; ++l) {
        const int64_t at = i + (j + l) * step - before;
        const bool inside = at >= 0 && at + 2 * kPer <= n;
        to[j + l] = inside ? shifted_pair(low[l], high[l], shift) : by_element(at + before);
      }
    }
  }

 private:
  __device__ uint4 by_element(int64_t i) const {
    T x[kPer];
#pragma unroll
    for (int k = 0; k < kPer; ++k)
      x[k] = i + k >= 0 && i + k < n ? row[i + k] : minus_infinity<T>();
    uint4 words;
    memcpy(&words, x, sizeof(words));
    return words;
  }
};

}  // namespace tenfold::cuda
