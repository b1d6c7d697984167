// SPDX-License-Identifier: Apache-2.0
// Device code of patchify, its inverse and masks: a warp a patch.
#pragma once

#include "pixels/cuda/patch_values.cuh"

namespace tenfold::cuda {

constexpr int kPatchesEach = 4;  // of a warp, one after the other

struct PatchifyArgs {
  PatchGrid grid;
  bool normalize;
  double eps;
  void* out;      // [images * L, P]
  void* targets;  // normalised ones of the same order and dtype; null: none
  bool vectors;   // set by the launch, as are the next two
  bool wide;
  int64_t patches;
};

template <class T, bool kHeld>
__global__ void __launch_bounds__(kPatchThreads) patchify_kernel(PatchifyArgs a) {
  constexpr int kN = kPerVector<T>;
  const int64_t n = a.grid.values(), length = a.grid.length();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kPatchWarps * kPatchesEach);
  for (int j = 0; j < kPatchesEach; ++j) {
    const int64_t i = begin + j * kPatchWarps + threadIdx.x / 32;
    if (i >= a.patches) return;
    const int64_t image = static_cast<uint32_t>(i) / static_cast<uint32_t>(length);
    const PatchReader<kN> reader{&a.grid, a.grid.box, a.grid.offset(image, i - image * length),
                                 a.vectors};
    const LaneValues<kN, kHeld> values(reader, n);
    const auto write = [&](void* to, bool normalize) {
      const ValueRule rule(values, normalize, a.eps);
      T* const row = static_cast<T*>(to) + i * n;
      values.each([&](int, int64_t k, const float (&x)[kN]) {
        float y[kN];
#pragma unroll
        for (int l = 0; l < kN; ++l) y[l] = rule(x[l]);
        store_some<T, kN>(y, row + k, n - k, a.wide);
      });
    };
    write(a.out, a.normalize);
    if (a.targets != nullptr) write(a.targets, true);
  }
}

// Lets a constant decide whether lanes hold their values.
template <class F>
inline void with_held(bool held, F f) {
  if (held) return f.template operator()<true>();
  f.template operator()<false>();
}

template <class T>
void launch_patchify(PatchifyArgs a, cudaStream_t stream) {
  constexpr int kN = kPerVector<T>;
  const int64_t n = a.grid.values();
  a.patches = a.grid.images * a.grid.length();
  if (a.patches == 0) return;
  a.vectors = in_vectors<kN>(a.grid, a.grid.box);
  a.wide =
      wide_rows<T, kN>(a.out, n, n) && (a.targets == nullptr || wide_rows<T, kN>(a.targets, n, n));
  const auto blocks = static_cast<unsigned>(patch_blocks(a.patches, kPatchesEach));
  const bool again = a.normalize || a.targets != nullptr;  // values are used more than once
  with_held(again && n <= 32 * kHeldValues, [&]<bool kHeld>() {
    TENFOLD_LAUNCH((patchify_kernel<T, kHeld>), blocks, kPatchThreads, stream, a);
  });
}

struct UnpatchifyArgs {
  PatchGrid grid;  // of the output
  PatchRows rows;
  const float *mean, *deviation;  // [images * L] or null
  bool vectors, wide;             // set by the launch, as is patches
  int64_t patches;
};

template <class T>
__global__ void __launch_bounds__(kPatchThreads) unpatchify_kernel(UnpatchifyArgs a) {
  constexpr int kN = kPerVector<T>;
  const int64_t n = a.grid.values(), length = a.grid.length();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPatchWarps + threadIdx.x / 32;
  if (i >= a.patches) return;
  const int64_t image = static_cast<uint32_t>(i) / static_cast<uint32_t>(length);
  const int64_t patch = i - image * length;
  const PatchReader<kN> places{&a.grid, a.grid.box, a.grid.offset(image, patch), a.vectors};
  const T* const row =
      static_cast<const T*>(a.rows.data) + image * a.rows.image_step + patch * a.rows.row_step;
  const float mean = a.mean != nullptr ? a.mean[i] : 0.0f;
  const float deviation = a.deviation != nullptr ? a.deviation[i] : 1.0f;
  auto* const image_data = const_cast<void*>(a.grid.data);
  for (int64_t k = static_cast<int64_t>(threadIdx.x % 32) * kN; k < n; k += 32 * kN) {
    float x[kN];
    uint8_t levels[kN];
    load_some<T, kN>(row + k, n - k, a.wide, x);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      x[j] = fmaf(x[j], deviation, mean);
      // NaN gives 0. Adding 2^23 rounds to a whole number, which the lowest bits then are.
      const float in = x[j] > 0.0f ? (x[j] < 1.0f ? x[j] : 1.0f) : 0.0f;
      levels[j] = static_cast<uint8_t>(float_to_bits(fmaf(in, 255.0f, 8388608.0f)));
    }
    uint32_t at[3];
    if (a.vectors) {
      auto* const to =
          static_cast<uint8_t*>(image_data) + places.place(static_cast<uint32_t>(k), at);
      if constexpr (kN == 8) {
        uint64_t words;
        memcpy(&words, levels, sizeof(words));
        *reinterpret_cast<uint64_t*>(to) = words;
      } else {
        uint32_t word;
        memcpy(&word, levels, sizeof(word));
        *reinterpret_cast<uint32_t*>(to) = word;
      }
      continue;
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (k + j >= n) break;
      const int64_t to = places.place(static_cast<uint32_t>(k + j), at);
      switch (a.grid.pixel) {
        case Pixel::u8: static_cast<uint8_t*>(image_data)[to] = levels[j]; break;
        case Pixel::f32: static_cast<float*>(image_data)[to] = x[j]; break;
        case Pixel::bf16: from_float(x[j], static_cast<bf16_t*>(image_data) + to); break;
        default: from_float(x[j], static_cast<fp16_t*>(image_data) + to);
      }
    }
  }
}

template <class T>
void launch_unpatchify(UnpatchifyArgs a, cudaStream_t stream) {
  constexpr int kN = kPerVector<T>;
  const int64_t n = a.grid.values();
  a.patches = a.grid.images * a.grid.length();
  if (a.patches == 0) return;
  a.vectors = in_vectors<kN>(a.grid, a.grid.box);
  a.wide = wide_rows<T, kN>(a.rows.data, a.rows.row_step, n) &&
           wide_rows<T, kN>(a.rows.data, a.rows.image_step, n);
  TENFOLD_LAUNCH(unpatchify_kernel<T>, static_cast<unsigned>(patch_blocks(a.patches, 1)),
                 kPatchThreads, stream, a);
}

struct MaskArgs {
  IntArray num_patches;
  int64_t rows, length;
  bool eos[2];
  uint8_t* out[2];  // [rows, length]; the second may be null
};

static __global__ void __launch_bounds__(kPatchThreads) patch_mask_kernel(MaskArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPatchThreads + threadIdx.x;
  if (i >= a.rows * a.length) return;
  const int64_t row = i / a.length, n = a.num_patches[row];
#pragma unroll
  for (int o = 0; o < 2; ++o)
    if (a.out[o] != nullptr)
      a.out[o][i] = i - row * a.length < patches_there(n, a.eos[o], a.length) ? 1 : 0;
}

inline int64_t mask_blocks(int64_t rows, int64_t length) {
  return (rows * length + kPatchThreads - 1) / kPatchThreads;
}

inline void launch_patch_mask(const MaskArgs& a, cudaStream_t stream) {
  if (a.rows > 0 && a.length > 0)
    TENFOLD_LAUNCH(patch_mask_kernel, static_cast<unsigned>(mask_blocks(a.rows, a.length)),
                   kPatchThreads, stream, a);
}

}  // namespace tenfold::cuda
