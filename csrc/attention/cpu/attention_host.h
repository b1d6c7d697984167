// SPDX-License-Identifier: Apache-2.0
// What the CPU registrations of dha_attention and its backward share: values of maps and of
// cu_seqlens and groups of heads.
#pragma once

#include <vector>

#include "attention/cpu/attention_task.h"
#include "attention/prefill_ops.h"
#include "core/parallel.h"

namespace tenfold::cpu {

// The index tensors of a call, read and checked. Its vectors back the pointers of AttentionParams.
struct AttentionIndices {
  std::vector<int32_t> kmap, vmap, cu_q, cu_k;
};

AttentionIndices read_attention_indices(const char* op, const Tensor& q, const Tensor& k,
                                        const Tensor& v, const Tensor& kmap, const Tensor& vmap,
                                        const AttentionArgs& a);

// Sets the index pointers of `p`, and for a packed batch its longest sequences.
void use_indices(const AttentionIndices& indices, AttentionParams* p);

// Query heads listed by (key head, value head).
struct AttentionGroups {
  std::vector<int32_t> heads;
  std::vector<AttentionGroup> groups;  // point into `heads`
};
AttentionGroups group_heads(const AttentionParams& p);

// The forward: writes out and lse.
void run_attention(const AttentionForward& p);

// Tensors of the backward, all with contiguous rows.
void set_gradients(const Tensor& out, const Tensor& dout, const Tensor& dq, const Tensor& dk,
                   const Tensor& dv, AttentionBackward* p);

// The backward: writes dq, dk and dv. A relative bias must lie as attention_backward_bias_step()
// says. `distances`, where not null, gets the sums of dS over batch and over the pairs of one
// distance, laid out as the bias: they are added to what is there.
void run_attention_backward(Isa isa, const AttentionBackward& p, const Tensor& dk, const Tensor& dv,
                            float* distances);

}  // namespace tenfold::cpu
