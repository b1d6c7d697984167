// SPDX-License-Identifier: Apache-2.0
// The values of a patch in the lanes of a warp, kN neighbours each. Where they come from a u8 image
// in aligned runs they are one load; else they are looked up one by one. The same values in the
// same lanes either way.
#pragma once

#include "core/vectors.cuh"
#include "pixels/patches.h"

namespace tenfold::cuda {

constexpr int kPatchWarps = 8, kPatchThreads = 32 * kPatchWarps;
// Of a patch of up to 768 values a lane holds its part in registers.
constexpr int kHeldValues = 24;

inline int64_t patch_blocks(int64_t patches, int64_t each) {
  return (patches + kPatchWarps * each - 1) / (kPatchWarps * each);
}

// Whether runs of kN bytes of every patch are aligned to kN.
template <int kN>
inline bool in_vectors(const PatchGrid& g, const PatchBox& box) {
  const auto whole = [](int64_t step) { return step % kN == 0; };
  return g.pixel == Pixel::u8 && whole(box.run()) && whole(box.stride[0]) &&
         (box.run() == box.size[1] * box.size[2] || whole(box.stride[1])) && whole(g.image_step) &&
         whole(g.row_step) && whole(g.col_step) && reinterpret_cast<uintptr_t>(g.data) % kN == 0;
}

template <int kN>
struct PatchReader {
  const PatchGrid* grid;
  PatchBox box;
  int64_t offset;  // of the patch
  bool vectors;    // see in_vectors

  __device__ float value(int64_t at) const {
    switch (grid->pixel) {
      case Pixel::u8: return static_cast<float>(static_cast<const uint8_t*>(grid->data)[at]);
      case Pixel::f32: return static_cast<const float*>(grid->data)[at];
      case Pixel::bf16: return to_float(static_cast<const bf16_t*>(grid->data)[at]);
      default: return to_float(static_cast<const fp16_t*>(grid->data)[at]);
    }
  }

  // Where value k is, and the places of it on the three axes.
  __device__ int64_t place(uint32_t k, uint32_t (&i)[3]) const {
    const auto inner = static_cast<uint32_t>(box.size[2]),
               rows = static_cast<uint32_t>(box.size[1]);
    const uint32_t row = k / inner;
    i[2] = k - row * inner;
    i[0] = row / rows;
    i[1] = row - i[0] * rows;
    return offset + i[0] * box.stride[0] + i[1] * box.stride[1] + i[2] * box.stride[2];
  }

  // Values k, ..., of which n exist; the others are 0.
  __device__ void load(int64_t k, int64_t n, float (&x)[kN]) const {
    uint32_t i[3];
    int64_t at = place(static_cast<uint32_t>(k), i);
    if (vectors) {
      const auto* const from = static_cast<const uint8_t*>(grid->data) + at;
      uint8_t bytes[kN];
      if constexpr (kN == 8) {
        const uint64_t words = *reinterpret_cast<const uint64_t*>(from);
        memcpy(bytes, &words, sizeof(words));
      } else {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
        memcpy(bytes, &word, sizeof(word));
      }
      // A byte in the lowest bits of 2^23: no conversion, which takes four times as long.
#pragma unroll
      for (int j = 0; j < kN; ++j) x[j] = bits_to_float(0x4B000000u | bytes[j]) - 8388608.0f;
      return;
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      x[j] = k + j < n ? value(at) : 0.0f;
      at += box.stride[2];
      if (++i[2] == box.size[2]) {
        i[2] = 0;
        at += box.stride[1] - box.size[2] * box.stride[2];
        if (++i[1] == box.size[1]) {
          i[1] = 0;
          at += box.stride[0] - box.size[1] * box.stride[1];
        }
      }
    }
  }
};

template <class T>
__device__ inline T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x = x + __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// This lane's part of a patch of n values. kHeld: read once, into registers.
template <int kN, bool kHeld>
struct LaneValues {
  static constexpr int kVectors = kHeld ? kHeldValues / kN : 1;
  PatchReader<kN> from;
  int64_t n;
  int lane;
  float held[kVectors][kN];

  __device__ LaneValues(const PatchReader<kN>& reader, int64_t values)
      : from(reader), n(values), lane(static_cast<int>(threadIdx.x % 32)) {
    if constexpr (kHeld) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (first(v) < n) from.load(first(v), n, held[v]);
    }
  }

  __device__ int64_t first(int v) const { return static_cast<int64_t>(v * 32 + lane) * kN; }

  // f(v, k, x): x = values k, k + 1, ...; v: which of the lane's vectors.
  template <class F>
  __device__ void each(F f) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (first(v) < n) f(v, first(v), held[v]);
    } else {
      for (int64_t k = first(0); k < n; k += 32 * kN) {
        float x[kN];
        from.load(k, n, x);
        f(0, k, x);
      }
    }
  }

  // In all lanes.
  __device__ PatchNorm norm(double eps) const {
    if (from.grid->pixel == Pixel::u8) {
      uint64_t sum = 0, squares = 0;
      each([&](int, int64_t, const float (&x)[kN]) {
        float s = 0.0f, q = 0.0f;  // whole numbers far below 2^24
#pragma unroll
        for (int j = 0; j < kN; ++j) s += x[j], q = fmaf(x[j], x[j], q);
        sum += static_cast<uint32_t>(s), squares += static_cast<uint32_t>(q);
      });
      return norm_of_bytes(warp_sum(sum), warp_sum(squares), n, eps);
    }
    uint32_t i[3];
    const float start = from.value(from.place(0, i));
    // Of a few values in float, of all in double: their rounding would be the variance's.
    double sum = 0.0;
    each([&](int, int64_t k, const float (&x)[kN]) {
      float s = 0.0f;
#pragma unroll
      for (int j = 0; j < kN; ++j) s += k + j < n ? x[j] - start : 0.0f;
      sum += s;
    });
    const float center = start + static_cast<float>(warp_sum(sum) / static_cast<double>(n));
    double rest = 0.0, squares = 0.0;
    each([&](int, int64_t k, const float (&x)[kN]) {
      float s = 0.0f, q = 0.0f;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float d = k + j < n ? x[j] - center : 0.0f;
        s += d, q = fmaf(d, d, q);
      }
      rest += s, squares += q;
    });
    return norm_of_floats(center, warp_sum(rest), warp_sum(squares), n, eps);
  }
};

// What becomes of a value.
struct ValueRule {
  bool normalize, bytes;
  float center, scale, offset;

  template <int kN, bool kHeld>
  __device__ ValueRule(const LaneValues<kN, kHeld>& values, bool normalized, double eps)
      : normalize(normalized), bytes(values.from.grid->pixel == Pixel::u8) {
    center = scale = offset = 0.0f;
    if (!normalize) return;
    const PatchNorm norm = values.norm(eps);
    center = static_cast<float>(norm.center), scale = static_cast<float>(norm.scale);
    offset = static_cast<float>(norm.offset);
  }
  __device__ float operator()(float x) const {
    if (normalize) return fmaf(x - center, scale, offset);
    return bytes ? level_of(x) : x;
  }
};

}  // namespace tenfold::cuda
