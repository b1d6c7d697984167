// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the decode ops share: argument checks (all that can be
// told from shapes, dtypes and scalars), and the layout of a cache in plain numbers.
// Checks of *values* in index tensors happen on CPU tensors only.
#pragma once

#include <optional>

#include "attention/dha_decode.h"
#include "core/tensor.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

// `t` or, if its rows are not contiguous, a copy. Before the checks: any dimensions.
inline Tensor with_readable_rows(const Tensor& t) {
  return t.dim() == 0 ? t : with_contiguous_rows(t);
}

struct DhaDecodeArgs {
  OptTensor block_table;  // [B, max_blocks]: the caches are paged
  int64_t block_size;
  std::optional<double> scale;  // default 1 / sqrt(D)
  int64_t window_left, num_splits;
  OptTensor kv_start;  // [B]
  OptTensor offsets;   // [B + 1]: the caches are ragged
  double softcap;
};

// Checked sizes, strides and scalars; pointers to index tensors are the caller's business.
DhaDecodeParams check_dha_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& kmap, const Tensor& vmap, const Tensor& kv_lens,
                                 const DhaDecodeArgs& a);

struct DhaAppendArgs {
  bool paged;
  OptTensor cos, sin;  // [B or 1, S, D]
};

DhaAppendParams check_dha_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                                 const Tensor& v, const Tensor& slots, const DhaAppendArgs& a);

}  // namespace tenfold
