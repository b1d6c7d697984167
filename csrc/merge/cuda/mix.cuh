// SPDX-License-Identifier: Apache-2.0
// How the elements of several models become one, step by step as merge/delta_merge.h writes it: the
// same bits as on a CPU. Also runs of elements of a thread, and which of them DARE keeps.
#pragma once

#include "core/vectors.cuh"
#include "merge/delta_merge.h"

namespace tenfold::cuda {

enum class Mix : int { plain, elected_sum, elected_mean };

__device__ inline float subtract(float a, float b) {
  return DetScalarOps::add(a, -b);
}

// The sums of one element over the experts.
template <Mix kMix>
struct MixSums {
  float sum = -0.0f, negative = -0.0f;  // plain: only the first
  float shares = 0.0f, negative_shares = 0.0f;

  __device__ void add(bool kept, float d, float weight, float share) {
    if constexpr (kMix == Mix::plain) {
      const float added = fmaf(weight, d, sum);
      sum = kept ? added : sum;
    } else {
      const float v = kept ? DetScalarOps::mul(weight, d) : 0.0f;
      sum = DetScalarOps::add(sum, 0.0f > v ? 0.0f : v);  // NaN reaches both sums
      negative = DetScalarOps::add(negative, 0.0f < v ? 0.0f : v);
      if constexpr (kMix == Mix::elected_mean) {
        shares = DetScalarOps::add(shares, v > 0.0f ? share : 0.0f);
        negative_shares = DetScalarOps::add(negative_shares, v < 0.0f ? share : 0.0f);
      }
    }
  }

  __device__ float result(float base, float lambda) const {
    if constexpr (kMix == Mix::plain) {
      return DetScalarOps::add(base, sum);
    } else {
      const bool positive = DetScalarOps::add(sum, negative) >= 0.0f;
      float mass = positive ? sum : negative;
      if constexpr (kMix == Mix::elected_mean) {
        const float share = positive ? shares : negative_shares;
        mass = mass / (share == 0.0f ? 1.0f : share);
      }
      return fmaf(mass, lambda, base);
    }
  }
};

// Calls f<mix>() for that of a merge.
template <class F>
void with_mix(const DeltaMerge& m, F&& f) {
  if (!m.elect) return f.template operator()<Mix::plain>();
  if (m.normalize) return f.template operator()<Mix::elected_mean>();
  f.template operator()<Mix::elected_sum>();
}

// Elements i .. i + kN - 1 of n, where i may be negative; 0 where there is none.
template <class T, int kN>
__device__ inline void load_run(const void* from, int64_t i, int64_t n, bool wide, float (&x)[kN]) {
  const T* const p = static_cast<const T*>(from);
  if (i >= 0) return load_some(p + (i < n ? i : 0), n - i, wide, x);
#pragma unroll
  for (int k = 0; k < kN; ++k) x[k] = i + k >= 0 && i + k < n ? to_float(p[i + k]) : 0.0f;
}

template <class T, int kN>
__device__ inline void store_run(const float (&x)[kN], void* to, int64_t i, int64_t n, bool wide) {
  T* const p = static_cast<T*>(to);
  if (i >= 0) return store_some(x, p + (i < n ? i : 0), n - i, wide);
#pragma unroll
  for (int k = 0; k < kN; ++k)
    if (i + k >= 0 && i + k < n) from_float(x[k], p + i + k);
}

inline bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class... Inputs>
bool all_aligned(const void* const* list, int count, const Inputs&... others) {
  bool all = (aligned(others) && ...);
  for (int i = 0; i < count; ++i) all = all && aligned(list[i]);
  return all;
}

constexpr int kDrawn = 16;  // elements that one Philox call decides about

// Bit j: whether element 16 n + j is kept.
__device__ inline uint32_t kept_bits(const DropKey& key, uint64_t n, uint32_t expert,
                                     DropLimit limit) {
  if (limit.high == 0 && limit.low == 0) return 0xFFFFu;
  const Philox4 words = drop_words(key, n, expert);
  const uint32_t least = limit.high + (limit.low != 0 ? 1u : 0u);  // that is kept without another
  uint32_t kept = 0, equal = 0;
#pragma unroll
  for (int j = 0; j < kDrawn; ++j) {
    const uint32_t u = words.word[j / 4] >> (8 * (j % 4)) & 255u;
    if (u >= least) kept |= 1u << j;
    if (u == limit.high) equal |= 1u << j;
  }
  if (limit.low == 0) return kept;
  for (; equal != 0; equal &= equal - 1) {
    const uint32_t bit = equal & (0u - equal);
    const uint64_t i = n * kDrawn + static_cast<uint64_t>(__popc(bit - 1u));
    if (!drop_by_second_draw(key, i, expert, limit)) kept |= bit;
  }
  return kept;
}

// Keys in the order of |d|: its float bits + 1; NaN is largest.
__device__ inline uint32_t magnitude_key(float d) {
  return d != d ? 0x80000000u : (float_to_bits(d) & 0x7FFFFFFFu) + 1u;
}

}  // namespace tenfold::cuda
