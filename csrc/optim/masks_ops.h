// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the mask operations share: argument checks, sizes, and
// how lists of tensors and masks become arguments of a kernel.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/contiguous.h"
#include "core/tensor.h"
#include "optim/mask.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// Number of elements of a bool tensor; anything else: TypeError.
int64_t check_pack_mask(const Tensor& mask);

// packed uint8 [ceil(n / 8)].
void check_unpack_mask(const Tensor& packed, int64_t n);

// uint8 [bytes].
void check_packed(const char* op, const Tensor& packed);

// Number of blocks of `block` bits.
int64_t check_mask_prefix(const Tensor& packed, int64_t block);

// floor(fraction * n) with fraction in [0, 1].
int64_t wanted_of(const char* op, int64_t n, double fraction);

// k of mask_topk.
int64_t check_mask_topk(const Tensor& score, double fraction);

// k of mask_random.
int64_t check_mask_random(int64_t n, double fraction);

// Gradients of grad_norm, contiguous where the order of elements does not matter.
struct GradNormArgs {
  std::vector<Tensor> grads;
  std::vector<Mask> masks;
  std::optional<double> scale;
  OptTensor scale_tensor;
};

GradNormArgs check_grad_norm(const std::vector<Tensor>& grads, const std::vector<OptTensor>& masks,
                             std::optional<double> grad_scale, const std::string& mask_kind,
                             int64_t block_size, const OptTensor& grad_scale_tensor);

// Masks of masked_copy_, one per tensor.
std::vector<Mask> check_masked_copy(const std::vector<Tensor>& dst, const std::vector<Tensor>& src,
                                    const std::vector<OptTensor>& masks,
                                    const std::string& mask_kind, int64_t block_size);

// `src` with the strides of `dst`, itself if it has them.
Tensor in_order_of(const Tensor& dst, const Tensor& src);

}  // namespace tenfold
