// SPDX-License-Identifier: Apache-2.0
// Checks that all ops of the family share: images, patches, masks.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/contiguous.h"
#include "core/tensor.h"
#include "pixels/patches.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// An image batch, and its grid of patches.
struct Image {
  Tensor tensor;               // as given, or a contiguous copy
  std::vector<int64_t> batch;  // leading sizes
  int64_t height, width, channels;
  PatchGrid grid;

  // `batch` and these sizes.
  std::vector<int64_t> sizes(std::initializer_list<int64_t> last) const;
};

// validate: values of float images on a CPU must be in [0, 1].
Image check_image(const char* op, const Tensor& image, int64_t patch, const std::string& layout,
                  const std::string& channels, bool validate);

// Of an image [.., H, W, C] or [.., C, H, W] with these strides of the last three dims.
PatchGrid grid_of(const void* data, Pixel pixel, int64_t patch, bool rcc, int64_t images,
                  const int64_t (&hwc)[3], int64_t image_step, const int64_t (&strides)[3]);

void check_patch(const char* op, int64_t patch, const std::string& layout);
void check_eps(const char* op, double eps);

Tensor new_output_of(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);

// float32 if there is none; else one of float32, bfloat16, float16.
ScalarType check_out_dtype(const char* op, const char* arg, std::optional<ScalarType> dtype);

// int32 or int64 of these sizes, contiguous; on a CPU at least 0 each.
Tensor check_num_patches(const char* op, const Tensor& num_patches,
                         const std::vector<int64_t>& sizes);

// A step that leads from each index of the leading dims to the next, if there is one.
std::optional<int64_t> one_step(const Tensor& t, int64_t dims);

std::string sizes_str(const std::vector<int64_t>& sizes);

// Whether all values are in [0, 1]; of a CPU tensor of any strides.
bool in_unit_range(const PatchGrid& grid);

}  // namespace tenfold
