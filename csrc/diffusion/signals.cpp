// SPDX-License-Identifier: Apache-2.0
#include "diffusion/signals.h"

#include <cmath>

namespace tenfold {

void check_real(const char* op, const char* arg, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Double) return check_float_dtype(op, arg, t);
  TENFOLD_CHECK_TYPE(t.is_cpu(), "tenfold::", op, ": ", arg,
                     " may be float64 on a CPU only; supported on ", device_str(t),
                     ": float32, bfloat16, float16");
}

void check_signal(const char* op, const char* arg, const Tensor& t) {
  check_real(op, arg, t);
  check_dim(op, arg, t, 3, "[B, C, L]");
}

namespace {

void check_shape_of(const char* op, const char* of_name, const Tensor& of, const char* arg,
                    const Tensor& t) {
  TENFOLD_CHECK_VALUE(same_sizes(of, t), "tenfold::", op, ": ", arg, " must have the shape of ",
                      of_name, " = ", shape_str(of), ", got ", shape_str(t));
  check_same_device(op, of_name, of, arg, t);
}

}  // namespace

void check_beside(const char* op, const char* of_name, const Tensor& of, const char* arg,
                  const Tensor& t) {
  check_same_dtype(op, of_name, of, arg, t);
  check_shape_of(op, of_name, of, arg, t);
}

void check_velocity(const char* op, const char* of_name, const Tensor& of, const char* arg,
                    const Tensor& t) {
  const ScalarType s = of.scalar_type(), got = t.scalar_type();
  const bool narrow = got == ScalarType::BFloat16 || got == ScalarType::Half;
  TENFOLD_CHECK_TYPE(got == s || (s == ScalarType::Float && narrow), "tenfold::", op, ": ", arg,
                     " must have the dtype of ", of_name, " (", dtype_name(s), ")",
                     s == ScalarType::Float ? ", or be bfloat16 or float16" : "", ", got ",
                     dtype_name(got));
  check_shape_of(op, of_name, of, arg, t);
}

void check_numbers(const char* op, const char* of_name, const Tensor& of, const char* arg,
                   const Tensor& t) {
  const ScalarType s = t.scalar_type();
  TENFOLD_CHECK_VALUE(s == ScalarType::Float || s == ScalarType::Double, "tenfold::", op, ": ", arg,
                      " must be float32 or float64, got ", dtype_name(s),
                      "; 16 bits cannot tell times apart");
  TENFOLD_CHECK_VALUE(t.dim() == 0 || (t.dim() == 1 && t.sizes()[0] == of.sizes()[0]),
                      "tenfold::", op, ": ", arg, " must be one number [], or [B] = [",
                      of.sizes()[0], "] to match ", of_name, ", got shape ", shape_str(t));
  check_same_device(op, of_name, of, arg, t);
}

void check_result(const char* op, const char* arg, const Tensor& t, const char* of_name,
                  const Tensor& of) {
  check_beside(op, of_name, of, arg, t);
  TENFOLD_CHECK_VALUE(t.is_contiguous(), "tenfold::", op, ": ", arg,
                      " is written in place and must be contiguous");
}

void check_same_or_apart(const char* op, const char* written, const Tensor& a, const char* other,
                         const Tensor& b) {
  const auto bytes = [](const Tensor& t) {
    return static_cast<intptr_t>(t.numel()) * static_cast<intptr_t>(t.element_size());
  };
  const auto at = reinterpret_cast<intptr_t>(a.data_ptr());
  const auto to = reinterpret_cast<intptr_t>(b.data_ptr());
  const bool apart = at + bytes(a) <= to || to + bytes(b) <= at;
  TENFOLD_CHECK_VALUE(apart || (at == to && a.scalar_type() == b.scalar_type()), "tenfold::", op,
                      ": ", written, " shares memory with ", other,
                      "; it may be the same tensor, or one that does not overlap it");
}

void check_times(const char* op, const char* arg, const Tensor& t) {
  if (!t.is_cpu()) return;
  const PerSample times = per_sample(t);
  for (int64_t i = 0; i < t.numel(); ++i) {
    const double x = times[i];
    TENFOLD_CHECK_VALUE(x >= 0.0 && x <= 1.0, "tenfold::", op, ": ", arg,
                        " must be in [0, 1], got ", x, " at ", i);
  }
}

}  // namespace tenfold
