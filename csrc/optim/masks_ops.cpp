// SPDX-License-Identifier: Apache-2.0
// Schemas of the mask operations (the only ones) and the argument checks shared by both backends.
#include "optim/masks_ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/overlap.h"
#include "core/tensor.h"
#include "optim/mask_args.h"

namespace tenfold {
namespace {

constexpr int64_t kMaxPrefixBits = int64_t{1} << 31;  // a prefix is int32

bool is_float(const Tensor& t) {
  const auto s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half;
}

// masks may be [] (none) or one entry per tensor.
void check_mask_list(const char* op, const char* arg, size_t tensors,
                     const std::vector<OptTensor>& masks) {
  TENFOLD_CHECK_VALUE(masks.empty() || masks.size() == tensors, "tenfold::", op,
                      ": masks must be empty or have one entry (a tensor or None) per tensor of ",
                      arg, ", got ", masks.size(), " for ", tensors);
}

}  // namespace

int64_t check_pack_mask(const Tensor& mask) {
  TENFOLD_CHECK_TYPE(mask.scalar_type() == ScalarType::Bool,
                     "tenfold::pack_mask: mask must be bool, got ", dtype_name(mask.scalar_type()));
  return mask.numel();
}

void check_packed(const char* op, const Tensor& packed) {
  TENFOLD_CHECK_TYPE(packed.scalar_type() == ScalarType::Byte, "tenfold::", op,
                     ": packed must be uint8 (packed bits, see pack_mask), got ",
                     dtype_name(packed.scalar_type()));
  check_dim(op, "packed", packed, 1, "[ceil(n / 8)]");
}

void check_unpack_mask(const Tensor& packed, int64_t n) {
  check_packed("unpack_mask", packed);
  TENFOLD_CHECK_VALUE(n >= 0, "tenfold::unpack_mask: n must be a number of bits >= 0, got ", n);
  const int64_t bytes = n / 8 + (n % 8 != 0 ? 1 : 0);
  TENFOLD_CHECK_VALUE(packed.numel() == bytes, "tenfold::unpack_mask: packed must be [", bytes,
                      "] to hold n = ", n, " bits, got ", shape_str(packed));
}

int64_t check_mask_prefix(const Tensor& packed, int64_t block) {
  check_packed("mask_prefix", packed);
  TENFOLD_CHECK_VALUE(block >= 32 && (block & (block - 1)) == 0,
                      "tenfold::mask_prefix: block must be a power of two >= 32, got ", block);
  const int64_t bits = 8 * packed.numel();
  TENFOLD_CHECK_VALUE(bits <= kMaxPrefixBits, "tenfold::mask_prefix: packed has ", bits,
                      " bits, at most 2^31 are supported");
  return bits / block + (bits % block != 0 ? 1 : 0);
}

int64_t wanted_of(const char* op, int64_t n, double fraction) {
  TENFOLD_CHECK_VALUE(fraction >= 0.0 && fraction <= 1.0, "tenfold::", op,
                      ": fraction must be in [0, 1], got ", fraction);
  return std::min(n, static_cast<int64_t>(std::floor(fraction * static_cast<double>(n))));
}

int64_t check_mask_topk(const Tensor& score, double fraction) {
  check_float_dtype("mask_topk", "score", score);
  return wanted_of("mask_topk", score.numel(), fraction);
}

int64_t check_mask_random(int64_t n, double fraction) {
  TENFOLD_CHECK_VALUE(n >= 0, "tenfold::mask_random: n must be a number of bits >= 0, got ", n);
  return wanted_of("mask_random", n, fraction);
}

GradNormArgs check_grad_norm(const std::vector<Tensor>& grads, const std::vector<OptTensor>& masks,
                             std::optional<double> grad_scale, const std::string& mask_kind,
                             int64_t block_size, const OptTensor& grad_scale_tensor) {
  constexpr auto op = "grad_norm";
  const MaskKind kind = to_mask_kind(op, mask_kind);
  check_block_size(op, block_size);
  check_mask_list(op, "grads", grads.size(), masks);
  TENFOLD_CHECK_VALUE(!grad_scale || !grad_scale_tensor,
                      "tenfold::grad_norm: give grad_scale or grad_scale_tensor, not both");
  TENFOLD_CHECK_VALUE(!grad_scale || (std::isfinite(*grad_scale) && *grad_scale != 0.0),
                      "tenfold::grad_norm: grad_scale must be a finite number other than 0, got ",
                      grad_scale.value_or(0.0));
  GradNormArgs out;
  out.scale = grad_scale;
  out.scale_tensor = grad_scale_tensor;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& g = grads[i];
    TENFOLD_CHECK_TYPE(is_float(g), "tenfold::grad_norm: grads[", i,
                       "] must be float32, bfloat16 or float16, got ", dtype_name(g.scalar_type()));
    TENFOLD_CHECK_VALUE(g.device() == grads[0].device(), "tenfold::grad_norm: grads[", i,
                        "] must be on the device of grads[0], ", device_str(grads[0]), ", got ",
                        device_str(g));
    const OptTensor mask = masks.empty() ? OptTensor() : masks[i];
    out.masks.push_back(
        check_mask(op, "grads", static_cast<int64_t>(i), g, mask, kind, block_size));
    const bool dense = is_dense(g);
    TENFOLD_CHECK_VALUE(dense || !mask, "tenfold::grad_norm: grads[", i,
                        "] must be dense (no gaps or overlaps in memory) to have a mask, got ",
                        shape_str(g), "; call .contiguous()");
  }
  if (grad_scale_tensor) {
    TENFOLD_CHECK_TYPE(grad_scale_tensor->scalar_type() == ScalarType::Float,
                       "tenfold::grad_norm: grad_scale_tensor must be float32, got ",
                       dtype_name(grad_scale_tensor->scalar_type()));
    TENFOLD_CHECK_VALUE(grad_scale_tensor->numel() == 1,
                        "tenfold::grad_norm: grad_scale_tensor must have one element, got ",
                        shape_str(*grad_scale_tensor));
    if (!grads.empty())
      check_same_device(op, "grads", grads[0], "grad_scale_tensor", *grad_scale_tensor);
  }
  for (const Tensor& g : grads) out.grads.push_back(is_dense(g) ? g : torch::stable::contiguous(g));
  return out;
}

std::vector<Mask> check_masked_copy(const std::vector<Tensor>& dst, const std::vector<Tensor>& src,
                                    const std::vector<OptTensor>& masks,
                                    const std::string& mask_kind, int64_t block_size) {
  constexpr auto op = "masked_copy_";
  const MaskKind kind = to_mask_kind(op, mask_kind);
  check_block_size(op, block_size);
  check_mask_list(op, "dst", dst.size(), masks);
  TENFOLD_CHECK_VALUE(dst.size() == src.size(),
                      "tenfold::masked_copy_: dst and src must have as many tensors, got ",
                      dst.size(), " and ", src.size());
  std::vector<Mask> out;
  for (size_t i = 0; i < dst.size(); ++i) {
    const Tensor &to = dst[i], &from = src[i];
    TENFOLD_CHECK_VALUE(to.device() == dst[0].device() && from.device() == to.device(),
                        "tenfold::masked_copy_: all tensors must be on the device of dst[0], ",
                        device_str(dst[0]), ", got dst[", i, "] on ", device_str(to), " and src[",
                        i, "] on ", device_str(from));
    TENFOLD_CHECK_VALUE(same_sizes(to, from), "tenfold::masked_copy_: src[", i,
                        "] must have the shape of dst[", i, "], ", shape_str(to), ", got ",
                        shape_str(from));
    TENFOLD_CHECK_TYPE(to.scalar_type() == from.scalar_type() || (is_float(to) && is_float(from)),
                       "tenfold::masked_copy_: src[", i, "] must have the dtype of dst[", i, "], ",
                       dtype_name(to.scalar_type()),
                       ", or both be of float32, bfloat16 and float16; got ",
                       dtype_name(from.scalar_type()));
    TENFOLD_CHECK_TYPE(to.element_size() <= 8, "tenfold::masked_copy_: dst[", i,
                       "] has elements of ", to.element_size(), " bytes, at most 8 are supported");
    TENFOLD_CHECK_VALUE(is_dense(to), "tenfold::masked_copy_: dst[", i,
                        "] must be dense (no gaps or overlaps in memory), got ", shape_str(to),
                        "; call .contiguous()");
    const OptTensor mask = masks.empty() ? OptTensor() : masks[i];
    out.push_back(check_mask(op, "dst", static_cast<int64_t>(i), to, mask, kind, block_size));
  }
  Memory memory(2 * dst.size());
  for (size_t i = 0; i < dst.size(); ++i) {
    memory.writes("dst", i, dst[i]);
    const bool itself = src[i].data_ptr() == dst[i].data_ptr() && same_order(dst[i], src[i]);
    if (!itself && is_dense(src[i])) memory.reads("src", i, src[i]);
  }
  memory.check(op);
  return out;
}

Tensor in_order_of(const Tensor& dst, const Tensor& src) {
  if (same_order(dst, src)) return src;
  Tensor copy = torch::stable::empty_like(dst);  // keeps the strides of a dense tensor
  return torch::stable::copy_(copy, src);
}

}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor packed, int n) -> Tensor");
  m.def("mask_popcount(Tensor packed) -> Tensor");
  m.def("mask_prefix(Tensor packed, int block=256) -> Tensor");
  m.def("mask_topk(Tensor score, float fraction) -> Tensor");
  m.def("mask_random(Tensor like, int n, float fraction, int seed, int stream=0) -> Tensor");
  m.def(
      "grad_norm(Tensor[] grads, Tensor?[] masks, float? grad_scale=None, *, "
      "str mask_kind=\"element\", int block_size=256, Tensor? grad_scale_tensor=None) -> Tensor");
  m.def(
      "masked_copy_(Tensor(a!)[] dst, Tensor[] src, Tensor?[] masks, *, "
      "str mask_kind=\"element\", int block_size=256) -> ()");
}
