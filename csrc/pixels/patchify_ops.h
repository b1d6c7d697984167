// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of patchify, its inverse and masks share: checked calls.
#pragma once

#include <tuple>

#include "pixels/images.h"

namespace tenfold {

// patchify_u8; with given_out into that.
struct PatchifyCall {
  Image image;
  bool normalize;
  double eps;
  Tensor out;  // [.., L, P], contiguous
};
PatchifyCall check_patchify(const char* op, const OptTensor& given_out, const Tensor& image,
                            int64_t patch, const std::string& layout, bool normalize, double eps,
                            std::optional<ScalarType> dtype, const std::string& channels,
                            bool validate);

struct PatchifyBatchCall {
  Image image;  // its grid is that of `patches`
  PatchBox target_box;
  Tensor num_patches;  // contiguous
  bool norm_pix, targets_wanted, eos_in_loss;
  double eps;
  Tensor patches, targets;  // [.., L, P]; targets [0] if they are not wanted
  Tensor mask, loss_mask;   // bool [.., L]
};
PatchifyBatchCall check_patchify_batch(const Tensor& image, const Tensor& num_patches,
                                       int64_t patch, const std::string& layout, bool norm_pix,
                                       double eps, std::optional<ScalarType> dtype,
                                       bool eos_in_loss, bool targets,
                                       std::optional<ScalarType> target_dtype,
                                       const std::string& channels, bool validate);

struct UnpatchifyCall {
  PatchGrid grid;        // of the output
  Tensor patches;        // [.., L, P], rows contiguous
  PatchRows rows;        // of them
  OptTensor mean, std_;  // [.., L], contiguous
  Tensor out;
};
UnpatchifyCall check_unpatchify(const Tensor& patches, int64_t patch, int64_t height, int64_t width,
                                const std::string& layout, std::optional<ScalarType> dtype,
                                const std::string& channels, const OptTensor& mean,
                                const OptTensor& std_);

struct MaskCall {
  Tensor num_patches;  // contiguous
  int64_t length;
  bool eos;
  Tensor out;  // bool [.., length]
};
MaskCall check_patch_mask(const Tensor& num_patches, int64_t length, bool eos);

// The ops, with the functions of a backend.
template <auto kPatchify, auto kBatch, auto kUnpatchify, auto kMask>
struct PatchifyOps {
  using OptDtype = std::optional<ScalarType>;

  static Tensor patchify(Tensor image, int64_t patch, std::string layout, bool normalize,
                         double eps, OptDtype dtype, std::string channels, bool validate) {
    const PatchifyCall c = check_patchify("patchify_u8", std::nullopt, image, patch, layout,
                                          normalize, eps, dtype, channels, validate);
    kPatchify(c);
    return c.out;
  }
  static void patchify_out(Tensor out, Tensor image, int64_t patch, std::string layout,
                           bool normalize, double eps, std::string channels, bool validate) {
    kPatchify(check_patchify("patchify_u8_", out, image, patch, layout, normalize, eps,
                             std::nullopt, channels, validate));
  }
  static std::tuple<Tensor, Tensor, Tensor, Tensor> batch(Tensor image, Tensor num_patches,
                                                          int64_t patch, std::string layout,
                                                          bool norm_pix, double eps, OptDtype dtype,
                                                          bool eos_in_loss, bool targets,
                                                          OptDtype target_dtype,
                                                          std::string channels, bool validate) {
    const PatchifyBatchCall c =
        check_patchify_batch(image, num_patches, patch, layout, norm_pix, eps, dtype, eos_in_loss,
                             targets, target_dtype, channels, validate);
    kBatch(c);
    return {c.patches, c.targets, c.mask, c.loss_mask};
  }
  static Tensor unpatchify(Tensor patches, int64_t patch, int64_t height, int64_t width,
                           std::string layout, OptDtype dtype, std::string channels, OptTensor mean,
                           OptTensor std_) {
    const UnpatchifyCall c =
        check_unpatchify(patches, patch, height, width, layout, dtype, channels, mean, std_);
    kUnpatchify(c);
    return c.out;
  }
  static Tensor mask(Tensor num_patches, int64_t length, bool eos) {
    const MaskCall c = check_patch_mask(num_patches, length, eos);
    kMask(c);
    return c.out;
  }
};

}  // namespace tenfold
