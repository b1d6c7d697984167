// SPDX-License-Identifier: Apache-2.0
#include "pixels/images.h"

#include <algorithm>
#include <cmath>

#include "core/scratch.h"

namespace tenfold {
namespace {

constexpr int64_t kMostPatch = 1024;

bool usual_channels(int64_t n) {
  return n == 1 || n == 3 || n == 4;
}

// Whether channels are the last dim.
bool channels_last(const char* op, const Tensor& image, const std::string& channels) {
  TENFOLD_CHECK_VALUE(channels == "auto" || channels == "first" || channels == "last",
                      "tenfold::", op, ": channels must be auto, first or last, got '", channels,
                      "'");
  if (channels != "auto") return channels == "last";
  const auto sizes = image.sizes();
  const size_t n = sizes.size();
  const bool last = usual_channels(sizes[n - 1]), first = usual_channels(sizes[n - 3]);
  TENFOLD_CHECK_VALUE(last != first, "tenfold::", op, ": image of shape ", shape_str(image),
                      " does not say which dim its channels are (the first or the last of the last "
                      "three, if one of the two is 1, 3 or 4); pass channels=\"first\" or "
                      "\"last\"");
  return last;
}

Pixel pixel_of(const char* op, const Tensor& image) {
  switch (image.scalar_type()) {
    case ScalarType::Byte: return Pixel::u8;
    case ScalarType::Float: return Pixel::f32;
    case ScalarType::BFloat16: return Pixel::bf16;
    case ScalarType::Half: return Pixel::f16;
    default:
      raise(ErrorKind::value, "tenfold::", op,
            ": image: expected uint8 or float in [0,1] (float32, bfloat16, float16), got ",
            dtype_name(image.scalar_type()));
  }
}

}  // namespace

std::optional<int64_t> one_step(const Tensor& t, int64_t dims) {
  int64_t step = 0, extent = 0;  // of what was seen from the inside
  bool any = false;
  for (int64_t i = dims - 1; i >= 0; --i) {
    const int64_t size = t.sizes()[i], stride = t.strides()[i];
    if (size == 0) return 0;
    if (size == 1) continue;
    if (any && stride != extent) return std::nullopt;
    if (!any) step = stride;
    any = true;
    extent = stride * size;
  }
  return step;
}

std::vector<int64_t> Image::sizes(std::initializer_list<int64_t> last) const {
  std::vector<int64_t> all(batch);
  all.insert(all.end(), last.begin(), last.end());
  return all;
}

std::string sizes_str(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << ']';
  return text.str();
}

void check_patch(const char* op, int64_t patch, const std::string& layout) {
  TENFOLD_CHECK_VALUE(patch >= 1 && patch <= kMostPatch, "tenfold::", op, ": patch must be in [1, ",
                      kMostPatch, "], got ", patch);
  TENFOLD_CHECK_VALUE(layout == "rcc" || layout == "crc", "tenfold::", op,
                      ": layout must be rcc or crc, got '", layout, "'");
}

void check_eps(const char* op, double eps) {
  TENFOLD_CHECK_VALUE(eps >= 0.0 && std::isfinite(eps), "tenfold::", op,
                      ": eps must be finite, and 0 or above, got ", eps);
}

PatchGrid grid_of(const void* data, Pixel pixel, int64_t patch, bool rcc, int64_t images,
                  const int64_t (&hwc)[3], int64_t image_step, const int64_t (&strides)[3]) {
  const auto [h, w, c] = strides;
  PatchGrid g{data,      pixel,     images, hwc[0] / patch, hwc[1] / patch, image_step,
              h * patch, w * patch, {}};
  if (hwc[2] == 1) {  // either order: rows of neighbours
    g.box = {{1, patch, patch}, {0, h, w}};
    return g;
  }
  g.box = rcc ? PatchBox{{patch, patch, hwc[2]}, {h, w, c}}
              : PatchBox{{hwc[2], patch, patch}, {c, h, w}};
  return g;
}

Image check_image(const char* op, const Tensor& image_in, int64_t patch, const std::string& layout,
                  const std::string& channels, bool validate) {
  check_patch(op, patch, layout);
  const Pixel pixel = pixel_of(op, image_in);
  const int64_t lead = image_in.dim() - 3;
  TENFOLD_CHECK_VALUE(lead >= 0, "tenfold::", op,
                      ": image must be [..., H, W, C] or [..., C, H, W], got shape ",
                      shape_str(image_in));
  const bool last = channels_last(op, image_in, channels);
  const Tensor image = one_step(image_in, lead) ? image_in : torch::stable::contiguous(image_in);
  const int64_t at[3] = {lead + (last ? 0 : 1), lead + (last ? 1 : 2), lead + (last ? 2 : 0)};
  const int64_t hwc[3] = {image.sizes()[at[0]], image.sizes()[at[1]], image.sizes()[at[2]]};
  const int64_t strides[3] = {image.strides()[at[0]], image.strides()[at[1]],
                              image.strides()[at[2]]};
  TENFOLD_CHECK_VALUE(hwc[0] % patch == 0 && hwc[1] % patch == 0, "tenfold::", op,
                      ": image of height ", hwc[0], " and width ", hwc[1],
                      " is not of whole patches of ", patch, " x ", patch);
  TENFOLD_CHECK_VALUE(hwc[2] >= 1 && patch * patch * hwc[2] <= kMostValues, "tenfold::", op,
                      ": a patch of ", patch, " x ", patch, " x ", hwc[2],
                      " values must have 1 to ", kMostValues);
  Image made{image, {}, hwc[0], hwc[1], hwc[2], {}};
  int64_t images = 1;
  for (int64_t i = 0; i < lead; ++i) {
    made.batch.push_back(image.sizes()[i]);
    images *= image.sizes()[i];
  }
  TENFOLD_CHECK_VALUE(images * (hwc[0] / patch) * (hwc[1] / patch) <= kMostPatches, "tenfold::", op,
                      ": image of shape ", shape_str(image), " has more than 2^31 - 1 patches of ",
                      patch, " x ", patch, "; split the batch");
  made.grid = grid_of(image.data_ptr(), pixel, patch, layout == "rcc", images, hwc,
                      *one_step(image, lead), strides);
  if (validate && pixel != Pixel::u8 && image.is_cpu())
    TENFOLD_CHECK_VALUE(in_unit_range(made.grid), "tenfold::", op,
                        ": image: expected uint8 or float in [0,1], got ",
                        dtype_name(image.scalar_type()),
                        " with values outside (validate=False takes them as they are)");
  return made;
}

Tensor new_output_of(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, sizes, dtype);
  if (out.is_cpu())
    advise_huge_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

ScalarType check_out_dtype(const char* op, const char* arg, std::optional<ScalarType> dtype) {
  const ScalarType s = dtype.value_or(ScalarType::Float);
  TENFOLD_CHECK_TYPE(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half,
                     "tenfold::", op, ": ", arg, " must be float32, bfloat16 or float16, got ",
                     dtype_name(s));
  return s;
}

Tensor check_num_patches(const char* op, const Tensor& num_patches,
                         const std::vector<int64_t>& sizes) {
  check_int_dtype(op, "num_patches", num_patches);
  const auto got = num_patches.sizes();
  TENFOLD_CHECK_VALUE(std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()),
                      "tenfold::", op, ": num_patches must have the image's batch shape ",
                      sizes_str(sizes), ", got ", shape_str(num_patches));
  const Tensor made = as_contiguous(num_patches);
  if (!made.is_cpu()) return made;
  const bool wide = made.scalar_type() == ScalarType::Long;
  for (int64_t i = 0; i < made.numel(); ++i) {
    const int64_t n = wide ? data_as<int64_t>(made)[i] : data_as<int32_t>(made)[i];
    TENFOLD_CHECK_VALUE(n >= 0, "tenfold::", op, ": num_patches must be at least 0, got ", n,
                        " at ", i);
  }
  return made;
}

}  // namespace tenfold
