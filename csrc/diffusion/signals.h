// SPDX-License-Identifier: Apache-2.0
// Arguments of the diffusion ops: signals [B, C, L], and numbers for each sample.
#pragma once

#include <optional>
#include <string>

#include "core/check.h"
#include "core/tensor.h"
#include "diffusion/vdiff.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// float32, bfloat16, float16; float64 on a CPU.
void check_real(const char* op, const char* arg, const Tensor& t);

// [B, C, L] of check_real.
void check_signal(const char* op, const char* arg, const Tensor& t);

// The shape, dtype and device of another argument.
void check_beside(const char* op, const char* of_name, const Tensor& of, const char* arg,
                  const Tensor& t);

// The shape and device of another one; its dtype, or 16 bits beside float32.
void check_velocity(const char* op, const char* of_name, const Tensor& of, const char* arg,
                    const Tensor& t);

// float32 or float64, [] or [B].
void check_numbers(const char* op, const char* of_name, const Tensor& of, const char* arg,
                   const Tensor& t);

// Contiguous, shape, dtype and device of `of`.
void check_result(const char* op, const char* arg, const Tensor& t, const char* of_name,
                  const Tensor& of);

// Two contiguous tensors, of which the first is written: the same memory, or none in common.
void check_same_or_apart(const char* op, const char* written, const Tensor& a, const char* other,
                         const Tensor& b);

// Of a CPU: all in [0, 1].
void check_times(const char* op, const char* arg, const Tensor& t);

inline PerSample per_sample(const Tensor& t) {
  return {t.data_ptr(), t.scalar_type() == ScalarType::Double, t.dim() == 1 ? t.strides()[0] : 0};
}

}  // namespace tenfold
