// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of patch_mse and its gradient share: checked calls.
#pragma once

#include <tuple>

#include "pixels/images.h"

namespace tenfold {

// A loss, its gradient, or both; what is not made is not there.
struct MseCall {
  Image image;
  const char* op;
  Tensor pred, mask;  // [.., L, P] with contiguous rows; [.., L] contiguous
  PatchMse mse;
  OptTensor given_denom;  // 0-d, of `real`
  ScalarType real;        // of losses: float64 if pred is, else float32
  OptTensor loss, per_patch, denom;
  OptTensor grad;
  OptTensor grad_loss;  // one number of `real`; none: 1
  bool made = false;    // grad holds what it is for grad_loss = 1

  int64_t positions() const { return mse.grid.images * mse.grid.length(); }
};

struct MseRule {
  int64_t patch;
  bool norm_pix;
  double eps;
  int64_t shift;
  const std::string& channels;
  bool validate;
};

// How the gradient is wanted.
enum class WithGrad { no, fresh, over_pred };

MseCall check_patch_mse(const char* op, WithGrad with, const Tensor& pred, const Tensor& image,
                        const Tensor& mask, const MseRule& rule, const OptTensor& denom);

// given_grad: where to write it.
MseCall check_patch_mse_backward(const char* op, const OptTensor& given_grad, bool made,
                                 const Tensor& grad_loss, const Tensor& pred, const Tensor& image,
                                 const Tensor& mask, const Tensor& denom, const MseRule& rule);

// The ops, with run(call) of a backend.
template <auto kRun>
struct MseOps {
  using Loss = std::tuple<Tensor, Tensor, Tensor>;

  static Loss loss(Tensor pred, Tensor image, Tensor mask, int64_t patch, bool norm_pix, double eps,
                   int64_t shift, OptTensor denom, std::string channels, bool validate) {
    const MseCall c = check_patch_mse("patch_mse", WithGrad::no, pred, image, mask,
                                      {patch, norm_pix, eps, shift, channels, validate}, denom);
    kRun(c);
    return {*c.loss, *c.per_patch, *c.denom};
  }
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor pred, Tensor image, Tensor mask,
                                                            int64_t patch, bool norm_pix,
                                                            double eps, int64_t shift,
                                                            OptTensor denom, std::string channels,
                                                            bool validate) {
    const MseCall c = check_patch_mse("patch_mse", WithGrad::fresh, pred, image, mask,
                                      {patch, norm_pix, eps, shift, channels, validate}, denom);
    kRun(c);
    return {*c.loss, *c.per_patch, *c.denom, *c.grad};
  }
  static Loss over(Tensor pred, Tensor image, Tensor mask, int64_t patch, bool norm_pix, double eps,
                   int64_t shift, OptTensor denom, std::string channels, bool validate) {
    const MseCall c = check_patch_mse("patch_mse_", WithGrad::over_pred, pred, image, mask,
                                      {patch, norm_pix, eps, shift, channels, validate}, denom);
    kRun(c);
    return {*c.loss, *c.per_patch, *c.denom};
  }
  static Tensor backward(Tensor grad_loss, Tensor pred, Tensor image, Tensor mask, Tensor denom,
                         int64_t patch, bool norm_pix, double eps, int64_t shift,
                         std::string channels) {
    const MseCall c =
        check_patch_mse_backward("patch_mse_backward", std::nullopt, false, grad_loss, pred, image,
                                 mask, denom, {patch, norm_pix, eps, shift, channels, false});
    kRun(c);
    return *c.grad;
  }
  static void backward_out(Tensor grad, Tensor grad_loss, Tensor pred, Tensor image, Tensor mask,
                           Tensor denom, int64_t patch, bool norm_pix, double eps, int64_t shift,
                           std::string channels, bool made) {
    kRun(check_patch_mse_backward("patch_mse_backward_", grad, made, grad_loss, pred, image, mask,
                                  denom, {patch, norm_pix, eps, shift, channels, false}));
  }
};

}  // namespace tenfold
