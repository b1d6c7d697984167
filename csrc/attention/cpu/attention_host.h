// What the CPU registrations of dha_attention and its backward share: values of maps and of
// cu_seqlens, groups of heads, and tasks over threads.
#pragma once

#include <algorithm>
#include <atomic>
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

// Threads take items [0, n) one by one from a common counter, so that items of unequal size (causal
// rows) balance. `make` gives each thread its own `run(item)`.
template <class Make>
void for_each_task(int64_t n, double total_micros, const Make& make) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const auto worth = static_cast<int64_t>(std::min(total_micros / kMinTaskMicros, 1e6));
  const int64_t workers = std::max<int64_t>(1, std::min({threads, n, worth}));
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    auto run = make();
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) run(i);
  };
  if (workers == 1) return work(0, 1);
  torch::stable::parallel_for(0, workers, 1, work);
}

}  // namespace tenfold::cpu
