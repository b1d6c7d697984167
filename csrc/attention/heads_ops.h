// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the head operations share: argument checks (everything
// that can be told from shapes, dtypes and scalars). Values of `groups` are checked on the CPU
// only.
#pragma once

#include <string_view>

#include "attention/group_heads.h"
#include "core/check.h"

namespace tenfold {

// w [H, d, m], omega [N, g, g, d] float32, groups [N, g] with N * g = H.
void check_fuse_heads(const char* op, const Tensor& w, const Tensor& omega, const Tensor& groups);

// The same, and dout [N, g, d, m].
void check_fuse_heads_backward(const char* op, const Tensor& dout, const Tensor& w,
                               const Tensor& omega, const Tensor& groups);

// omega [N, g, g, d] float32 with g >= 1.
void check_fusion_omega(const char* op, const Tensor& omega);

void check_fusion_mse_backward(const char* op, const Tensor& dout, const Tensor& omega);

// w [H, d, m].
void check_head_cka(const char* op, const Tensor& w);

// dist [H, H] float32 or float64; n_groups divides H.
GroupSolver check_group_heads(const char* op, const Tensor& dist, int64_t n_groups,
                              std::string_view solver, int64_t restarts);

// cost [C, K] float32 or float64; sizes [K] or [C, K].
void check_allocate_heads(const char* op, const Tensor& cost, const Tensor& sizes, int64_t budget);

}  // namespace tenfold
