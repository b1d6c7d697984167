// SPDX-License-Identifier: Apache-2.0
// Images as rows of patches, and the loss on them (PixelGPT sections 3.2, 3.3 and 3.5).
//
//   patchify_u8     image [.., H, W, C] or [.., C, H, W] -> patches [.., L, P]; unpatchify: back
//   patchify_batch  the same for a batch of strips, with regression targets and masks in one pass
//   patch_mask      which patches of a strip are there
//   patch_mse       l_i = 1/P sum_k (f_ik - y_(i + shift),k)^2, weighted mean; y never stored
//
// L = (H / p) (W / p) patches, row by row; P = p p C values each, in the order (row, column,
// channel) ("rcc") or (channel, row, column) ("crc"). Of a value x = u / 255 of a patch with mean m
// and variance v (divisor P - 1), normalised: y = (x - m) / sqrt(v + eps). Of bytes the sums are
// integers: a constant patch is 0 exactly, whatever it holds.
// Traffic: every image value read once, every output written once; patch_mse reads pred once more.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

enum class Pixel : int { u8, f32, bf16, f16 };

constexpr int64_t pixel_size(Pixel p) {
  return p == Pixel::u8 ? 1 : p == Pixel::f32 ? 4 : 2;
}

// Positions of a patch in the order of its values: three nested axes, strides in elements.
struct PatchBox {
  int64_t size[3], stride[3];

  // Values that are neighbours in both orders.
  TENFOLD_HD_MEMBER int64_t run() const {
    if (stride[2] != 1) return 1;
    return stride[1] == size[2] ? size[1] * size[2] : size[2];
  }
};

// The patches of a batch of images, numbered image by image, row by row.
struct PatchGrid {
  const void* data;
  Pixel pixel;
  int64_t images, rows, cols;
  int64_t image_step, row_step, col_step;  // elements from one to the next
  PatchBox box;

  TENFOLD_HD_MEMBER int64_t length() const { return rows * cols; }
  TENFOLD_HD_MEMBER int64_t values() const { return box.size[0] * box.size[1] * box.size[2]; }
  // Where a patch of an image begins.
  TENFOLD_HD_MEMBER int64_t offset(int64_t image, int64_t patch) const {
    // Fewer than 2^31: check_image sees to that.
    const int64_t row = static_cast<uint32_t>(patch) / static_cast<uint32_t>(cols);
    return image * image_step + row * row_step + (patch - row * cols) * col_step;
  }
};

// y = (x - center) scale + offset, where x - center loses nothing near the mean.
struct PatchNorm {
  double center, scale, offset;
};

// rest: mean - center.
TENFOLD_HD PatchNorm patch_norm(double center, double rest, double variance, double eps) {
  const double root = std::sqrt(variance + eps);
  const double scale = root > 0.0 ? 1.0 / root : 0.0;  // eps = 0 and a constant patch: 0
  return {center, scale, -rest * scale};
}

// Of n bytes with these sums of them and of their squares. n^2 255^2 fits 64 bits: see kMostValues.
TENFOLD_HD PatchNorm norm_of_bytes(uint64_t sum, uint64_t squares, int64_t n, double eps) {
  const auto count = static_cast<uint64_t>(n);
  const uint64_t center = (2 * sum + count) / (2 * count);
  const auto rest = static_cast<int64_t>(sum) - static_cast<int64_t>(center * count);
  const double pairs = static_cast<double>(n) * static_cast<double>(n - 1);
  const double spread = static_cast<double>(count * squares - sum * sum);
  return patch_norm(static_cast<double>(center), static_cast<double>(rest) / static_cast<double>(n),
                    n > 1 ? spread / pairs : 0.0, 65025.0 * eps);
}

// Of n floats with these sums of their differences to a center near their mean.
TENFOLD_HD PatchNorm norm_of_floats(double center, double sum, double squares, int64_t n,
                                    double eps) {
  const auto count = static_cast<double>(n);
  const double rest = sum / count, spread = squares - sum * rest;
  return patch_norm(center, rest, n > 1 && spread > 0.0 ? spread / (count - 1.0) : 0.0, eps);
}

constexpr int64_t kMostValues = int64_t{1} << 22;         // of a patch
constexpr int64_t kMostPatches = (int64_t{1} << 31) - 1;  // of a batch

// u / 255, rounded once: 1 / 255 in two parts.
constexpr float kLevelHigh = 8421505.0f / 2147483648.0f;
constexpr auto kLevelLow = static_cast<float>(-127.0 / (255.0 * 2147483648.0));
TENFOLD_HD float level_of(float u) {
  return std::fma(u, kLevelHigh, u * kLevelLow);
}

// Patches of a strip that count: num_patches of text and, with eos, the one after them.
TENFOLD_HD int64_t patches_there(int64_t num_patches, bool eos, int64_t length) {
  const int64_t n = num_patches + (eos ? 1 : 0);
  return n < 0 ? 0 : n < length ? n : length;
}

// Weights of patches as numbers, whatever they are held as.
enum class WeightKind : int { u8, i32, i64, f32, f64 };

struct PatchWeights {
  const void* data;
  WeightKind kind;

  TENFOLD_HD_MEMBER double operator[](int64_t i) const {
    switch (kind) {
      case WeightKind::u8: return static_cast<const uint8_t*>(data)[i];
      case WeightKind::i32: return static_cast<const int32_t*>(data)[i];
      case WeightKind::i64: return static_cast<double>(static_cast<const int64_t*>(data)[i]);
      case WeightKind::f32: return static_cast<const float*>(data)[i];
      default: return static_cast<const double*>(data)[i];
    }
  }
};

// A [images, L, P] tensor whose last dim is contiguous, in elements.
struct PatchRows {
  void* data;
  int64_t image_step, row_step;
};

// Position i predicts patch i + shift, and weighs as much as that counts.
struct PatchMse {
  PatchGrid grid;
  PatchRows pred;
  PatchWeights weights;  // [images, L]
  bool normalize;
  double eps;
  int64_t shift;
  PatchRows grad;    // data null: not asked for. May be pred
  float* per_patch;  // [images, L]; null likewise

  TENFOLD_HD_MEMBER bool has_target(int64_t position) const {
    return position < grid.length() - shift;
  }
};

// What a patch's error sum is multiplied by in d loss / d pred, at weight 1.
TENFOLD_HD double error_slope(double grad, int64_t values, double denom) {
  return denom > 0.0 ? 2.0 * grad / (static_cast<double>(values) * denom) : 0.0;
}

}  // namespace tenfold
