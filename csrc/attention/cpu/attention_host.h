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

}  // namespace tenfold::cpu
