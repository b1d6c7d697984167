// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of patchify_u8, patchify_batch, unpatchify and patch_mask.
#include "pixels/patchify_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/overlap.h"

namespace tenfold {
namespace {

bool has_sizes(const Tensor& t, const std::vector<int64_t>& want) {
  const auto got = t.sizes();
  return std::equal(got.begin(), got.end(), want.begin(), want.end());
}

// Of a tensor that may be written where `image` is read.
void check_given(const char* op, const Tensor& out, const Tensor& image,
                 const std::vector<int64_t>& sizes) {
  check_float_dtype(op, "out", out);
  TENFOLD_CHECK_VALUE(has_sizes(out, sizes), "tenfold::", op,
                      ": out must have shape [..., L, P] = ", sizes_str(sizes), ", got ",
                      shape_str(out));
  check_same_device(op, "image", image, "out", out);
  TENFOLD_CHECK_VALUE(out.is_contiguous(), "tenfold::", op, ": out must be contiguous");
  Memory memory(2);
  memory.writes("out", 0, out);
  if (is_dense(image)) memory.reads("image", 0, image);
  memory.check(op);
}

OptTensor check_moment(const char* arg, const OptTensor& t, const Tensor& patches,
                       const std::vector<int64_t>& sizes) {
  constexpr auto kOp = "unpatchify";
  if (!t) return std::nullopt;
  TENFOLD_CHECK_TYPE(t->scalar_type() == ScalarType::Float, "tenfold::", kOp, ": ", arg,
                     " must be float32, got ", dtype_name(t->scalar_type()));
  TENFOLD_CHECK_VALUE(has_sizes(*t, sizes), "tenfold::", kOp, ": ", arg,
                      " must have shape [..., L] = ", sizes_str(sizes), ", got ", shape_str(*t));
  check_same_device(kOp, "patches", patches, arg, *t);
  return as_contiguous(*t);
}

}  // namespace

PatchifyCall check_patchify(const char* op, const OptTensor& given_out, const Tensor& image_in,
                            int64_t patch, const std::string& layout, bool normalize, double eps,
                            std::optional<ScalarType> dtype, const std::string& channels,
                            bool validate) {
  check_eps(op, eps);
  const ScalarType made = check_out_dtype(op, "dtype", dtype);
  const Image image = check_image(op, image_in, patch, layout, channels, validate);
  const std::vector<int64_t> sizes = image.sizes({image.grid.length(), image.grid.values()});
  if (given_out) check_given(op, *given_out, image_in, sizes);
  return {image, normalize, eps, given_out ? *given_out : new_output_of(image.tensor, sizes, made)};
}

PatchifyBatchCall check_patchify_batch(const Tensor& image_in, const Tensor& num_patches,
                                       int64_t patch, const std::string& layout, bool norm_pix,
                                       double eps, std::optional<ScalarType> dtype,
                                       bool eos_in_loss, bool targets,
                                       std::optional<ScalarType> target_dtype,
                                       const std::string& channels, bool validate) {
  constexpr auto kOp = "patchify_batch";
  check_eps(kOp, eps);
  const ScalarType made = check_out_dtype(kOp, "dtype", dtype);
  const ScalarType made_targets = check_out_dtype(kOp, "target_dtype", target_dtype);
  const Image image = check_image(kOp, image_in, patch, layout, channels, validate);
  const Tensor counts = check_num_patches(kOp, num_patches, image.batch);
  check_same_device(kOp, "image", image_in, "num_patches", num_patches);
  const PatchBox& box = image.grid.box;
  // Targets are rcc: a box of crc has its axes in the order 1, 2, 0.
  const bool turned = layout == "crc" && image.channels > 1;
  const PatchBox target_box = turned ? PatchBox{{box.size[1], box.size[2], box.size[0]},
                                                {box.stride[1], box.stride[2], box.stride[0]}}
                                     : box;
  const std::vector<int64_t> sizes = image.sizes({image.grid.length(), image.grid.values()});
  const std::vector<int64_t> lengths = image.sizes({image.grid.length()});
  const Tensor& like = image.tensor;
  return {image,
          target_box,
          counts,
          norm_pix,
          targets,
          eos_in_loss,
          eps,
          new_output_of(like, sizes, made),
          targets ? new_output_of(like, sizes, made_targets) : new_output(like, {0}, made_targets),
          new_output_of(like, lengths, ScalarType::Bool),
          new_output_of(like, lengths, ScalarType::Bool)};
}

UnpatchifyCall check_unpatchify(const Tensor& patches_in, int64_t patch, int64_t height,
                                int64_t width, const std::string& layout,
                                std::optional<ScalarType> dtype, const std::string& channels,
                                const OptTensor& mean, const OptTensor& std_) {
  constexpr auto kOp = "unpatchify";
  check_patch(kOp, patch, layout);
  check_float_dtype(kOp, "patches", patches_in);
  TENFOLD_CHECK_VALUE(channels == "first" || channels == "last", "tenfold::", kOp,
                      ": channels must be first or last, got '", channels, "'");
  const ScalarType made = dtype.value_or(ScalarType::Byte);
  TENFOLD_CHECK_TYPE(made == ScalarType::Byte || made == ScalarType::Float ||
                         made == ScalarType::BFloat16 || made == ScalarType::Half,
                     "tenfold::", kOp, ": dtype must be uint8, float32, bfloat16 or float16, got ",
                     dtype_name(made));
  const int64_t lead = patches_in.dim() - 2;
  TENFOLD_CHECK_VALUE(lead >= 0, "tenfold::", kOp, ": patches must be [..., L, P], got shape ",
                      shape_str(patches_in));
  TENFOLD_CHECK_VALUE(height >= 0 && width >= 0 && height % patch == 0 && width % patch == 0,
                      "tenfold::", kOp, ": image of height ", height, " and width ", width,
                      " is not of whole patches of ", patch, " x ", patch);
  const int64_t length = patches_in.sizes()[lead], values = patches_in.sizes()[lead + 1];
  TENFOLD_CHECK_VALUE(length == height / patch * (width / patch), "tenfold::", kOp,
                      ": patches must be ", height / patch * (width / patch),
                      " for an image of height ", height, " and width ", width, ", got ", length);
  TENFOLD_CHECK_VALUE(values >= 1 && values % (patch * patch) == 0 && values <= kMostValues,
                      "tenfold::", kOp, ": patches of ", values, " values are not of ", patch,
                      " x ", patch, " pixels (of at most ", kMostValues, " values)");
  const bool rows_whole =
      one_step(patches_in, lead) && (values == 1 || patches_in.strides()[lead + 1] == 1);
  UnpatchifyCall c{
      {}, rows_whole ? patches_in : torch::stable::contiguous(patches_in), {}, {}, {}, patches_in};
  std::vector<int64_t> batch;
  int64_t images = 1;
  for (int64_t i = 0; i < lead; ++i) {
    batch.push_back(patches_in.sizes()[i]);
    images *= batch.back();
  }
  TENFOLD_CHECK_VALUE(images * length <= kMostPatches, "tenfold::", kOp, ": ", images * length,
                      " patches are more than 2^31 - 1; split the batch");
  std::vector<int64_t> lengths(batch), sizes(batch);
  lengths.push_back(length);
  c.mean = check_moment("mean", mean, patches_in, lengths);
  c.std_ = check_moment("std", std_, patches_in, lengths);
  c.rows = {c.patches.data_ptr(), *one_step(c.patches, lead), c.patches.strides()[lead]};
  const int64_t depth = values / (patch * patch), hwc[3] = {height, width, depth};
  const bool last = channels == "last";
  const int64_t last_sizes[3] = {last ? height : depth, last ? width : height,
                                 last ? depth : width};
  sizes.insert(sizes.end(), last_sizes, last_sizes + 3);
  c.out = new_output_of(patches_in, sizes, made);
  const int64_t strides[3] = {last ? width * depth : width, last ? depth : 1,
                              last ? 1 : height * width};
  const Pixel pixel = made == ScalarType::Byte    ? Pixel::u8
                      : made == ScalarType::Float ? Pixel::f32
                      : made == ScalarType::Half  ? Pixel::f16
                                                  : Pixel::bf16;
  c.grid = grid_of(c.out.data_ptr(), pixel, patch, layout == "rcc", images, hwc,
                   height * width * depth, strides);
  return c;
}

MaskCall check_patch_mask(const Tensor& num_patches, int64_t length, bool eos) {
  constexpr auto kOp = "patch_mask";
  TENFOLD_CHECK_VALUE(length >= 0, "tenfold::", kOp, ": length must be at least 0, got ", length);
  std::vector<int64_t> sizes(num_patches.sizes().begin(), num_patches.sizes().end());
  const Tensor counts = check_num_patches(kOp, num_patches, sizes);
  sizes.push_back(length);
  return {counts, length, eos, new_output_of(num_patches, sizes, ScalarType::Bool)};
}

}  // namespace tenfold

// channels: "auto", "first" or "last": which of the last three dims the channels are. validate:
// look for values of float images outside [0, 1] (on a CPU).
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def(
      "patchify_u8(Tensor image, int patch, str layout, bool normalize, float eps, "
      "ScalarType? dtype, *, str channels=\"auto\", bool validate=True) -> Tensor");
  m.def(
      "patchify_u8_(Tensor(a!) out, Tensor image, int patch, str layout, bool normalize, "
      "float eps, *, str channels=\"auto\", bool validate=True) -> ()");
  m.def(
      "patchify_batch(Tensor image, Tensor num_patches, int patch, str layout, bool norm_pix, "
      "float eps, ScalarType? dtype, bool eos_in_loss, *, bool targets=True, "
      "ScalarType? target_dtype=None, str channels=\"auto\", bool validate=True) "
      "-> (Tensor patches, Tensor targets, Tensor mask, Tensor loss_mask)");
  m.def(
      "unpatchify(Tensor patches, int patch, int height, int width, str layout, "
      "ScalarType? dtype, *, str channels=\"first\", Tensor? mean=None, Tensor? std=None) "
      "-> Tensor");
  m.def("patch_mask(Tensor num_patches, int length, bool eos=True) -> Tensor");
}
