// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of dha_attention share: argument checks (all that can be told
// from shapes, dtypes and scalars), allocation in the caller's memory order, and the kernel's
// parameters. Values of index tensors are checked on CPU tensors only.
#pragma once

#include <optional>

#include "attention/dha_attention.h"
#include "core/tensor.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

struct AttentionArgs {
  std::optional<double> scale;  // default 1 / sqrt(D)
  bool causal;
  int64_t window_left, window_right;
  OptTensor cu_seqlens_q, cu_seqlens_k;  // [B + 1] int32
  int64_t max_q, max_k;                  // varlen: longest sequences; 0: not known
  OptTensor attn_bias;
  double softcap;
};

void check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& kmap, const Tensor& vmap, const AttentionArgs& a);

void check_attention_backward(const char* op, const Tensor& dout, const Tensor& q, const Tensor& v,
                              const Tensor& out, const Tensor& lse, const OptTensor& dlse,
                              bool varlen);

// Sizes, strides, mask and scalars of checked arguments. Left to the caller: pointers to maps and
// cu_seqlens, and for varlen max_q and max_k, where 0.
AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const AttentionArgs& a);

RowLayout row_layout(const Tensor& t);

// Fresh tensor with the memory order of `like` ([B, H, S, D] views of [B, S, H, D] memory stay such
// views), last dimension `dim`.
Tensor new_like_rows(const Tensor& like, int64_t dim);

Tensor new_lse(const Tensor& q);

}  // namespace tenfold
