// SPDX-License-Identifier: Apache-2.0
// Schemas and checks of fir_down2 and fir_up2_cat.
#include "diffusion/resample_ops.h"

#include <torch/csrc/stable/library.h>

namespace tenfold {
namespace {

void check_length(const char* op, const char* arg, int64_t length, Fir kind) {
  TENFOLD_CHECK_VALUE(length >= fir_least(kind), "tenfold::", op, ": ", arg, " must have at least ",
                      fir_least(kind), " positions to be reflected at its ends, got ", length);
}

// To be written, [B, C, L] of the given sizes.
void check_out(const char* op, const Tensor& out, const Tensor& x, int64_t channels,
               int64_t length) {
  check_same_dtype(op, "x", x, "out", out);
  check_sizes(op, "out", out, {x.sizes()[0], channels, length}, "[B, C, L]");
  check_same_device(op, "x", x, "out", out);
  TENFOLD_CHECK_VALUE(length == 1 || out.numel() == 0 || out.strides()[2] == 1, "tenfold::", op,
                      ": out is written in place and must have contiguous rows");
  check_no_overlap(op, "out", out);
}

// From the first to the last element.
struct Extent {
  intptr_t begin, end;
};
Extent extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.sizes()[i] - 1) * t.strides()[i];
  const auto at = reinterpret_cast<intptr_t>(t.data_ptr());
  const auto size = static_cast<intptr_t>(t.element_size());
  return {at, at + (last + 1) * size};
}

void check_out_apart(const char* op, const Tensor& out, const char* other, const Tensor& t) {
  if (out.numel() == 0 || t.numel() == 0) return;
  const Extent a = extent(out), b = extent(t);
  TENFOLD_CHECK_VALUE(a.end <= b.begin || b.end <= a.begin, "tenfold::", op,
                      ": out shares memory with ", other, ", which it must not");
}

}  // namespace

FirCall check_fir_down2(const char* op, const Tensor* out, const Tensor& x) {
  check_signal(op, "x", x);
  const int64_t batch = x.sizes()[0], channels = x.sizes()[1], length = x.sizes()[2];
  check_length(op, "x", length, Fir::down);
  if (out != nullptr) {
    check_out(op, *out, x, channels, length / 2);
    check_out_apart(op, *out, "x", x);
  }
  return {Fir::down,
          with_contiguous_rows(x),
          std::nullopt,
          out != nullptr ? *out : new_output(x, {batch, channels, length / 2}, x.scalar_type()),
          batch,
          channels,
          length,
          length / 2,
          out == nullptr};
}

FirCall check_fir_down2_backward(const Tensor& grad, int64_t length) {
  constexpr auto kOp = "fir_down2_backward";
  check_signal(kOp, "grad", grad);
  const int64_t batch = grad.sizes()[0], channels = grad.sizes()[1];
  check_length(kOp, "length", length, Fir::down_grad);
  check_sizes(kOp, "grad", grad, {batch, channels, length / 2}, "[B, C, length / 2]");
  return {Fir::down_grad,
          with_contiguous_rows(grad),
          std::nullopt,
          new_output(grad, {batch, channels, length}, grad.scalar_type()),
          batch,
          channels,
          length,
          length,
          true};
}

FirCall check_fir_up2_cat(const char* op, const Tensor* out, const Tensor& x,
                          const OptTensor& skip) {
  check_signal(op, "x", x);
  const int64_t batch = x.sizes()[0], channels = x.sizes()[1], length = x.sizes()[2];
  check_length(op, "x", length, Fir::up);
  int64_t total = channels;
  if (skip) {
    check_same_dtype(op, "x", x, "skip", *skip);
    check_dim(op, "skip", *skip, 3, "[B, K, 2 L]");
    check_sizes(op, "skip", *skip, {batch, skip->sizes()[1], 2 * length}, "[B, K, 2 L]");
    check_same_device(op, "x", x, "skip", *skip);
    total += skip->sizes()[1];
  } else if (out != nullptr && out->dim() == 3 && out->sizes()[1] > channels) {
    total = out->sizes()[1];  // what is behind stays
  }
  if (out != nullptr) {
    check_out(op, *out, x, total, 2 * length);
    check_out_apart(op, *out, "x", x);
    if (skip) check_out_apart(op, *out, "skip", *skip);
  }
  FirCall c{Fir::up,
            with_contiguous_rows(x),
            std::nullopt,
            out != nullptr ? *out : new_output(x, {batch, total, 2 * length}, x.scalar_type()),
            batch,
            channels,
            length,
            2 * length,
            out == nullptr};
  if (skip) c.skip = with_contiguous_rows(*skip);
  return c;
}

FirCall check_fir_up2_backward(const Tensor& grad, int64_t channels) {
  constexpr auto kOp = "fir_up2_backward";
  check_signal(kOp, "grad", grad);
  const int64_t batch = grad.sizes()[0], length = grad.sizes()[2] / 2;
  TENFOLD_CHECK_VALUE(channels >= 0 && channels <= grad.sizes()[1], "tenfold::", kOp,
                      ": channels must be 0 to ", grad.sizes()[1], ", those of grad, got ",
                      channels);
  TENFOLD_CHECK_VALUE(grad.sizes()[2] % 2 == 0, "tenfold::", kOp,
                      ": grad must have an even length, got ", grad.sizes()[2]);
  check_length(kOp, "grad / 2", length, Fir::up_grad);
  return {Fir::up_grad, with_contiguous_rows(grad),
          std::nullopt, new_output(grad, {batch, channels, length}, grad.scalar_type()),
          batch,        channels,
          length,       length,
          true};
}

}  // namespace tenfold

// The forms that end in _ write into out. fir_up2_backward reads the first `channels` of grad.
STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("fir_down2(Tensor x) -> Tensor");
  m.def("fir_down2_(Tensor(a!) out, Tensor x) -> ()");
  m.def("fir_down2_backward(Tensor grad, int length) -> Tensor");
  m.def("fir_up2_cat(Tensor x, Tensor? skip) -> Tensor");
  m.def("fir_up2_cat_(Tensor(a!) out, Tensor x, Tensor? skip) -> ()");
  m.def("fir_up2_backward(Tensor grad, int channels) -> Tensor");
}
