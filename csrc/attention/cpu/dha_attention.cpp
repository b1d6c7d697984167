// SPDX-License-Identifier: Apache-2.0
// CPU registration of dha_attention: tensors -> parameters, tasks over threads.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>

#include "attention/cpu/attention_host.h"
#include "core/scratch.h"

namespace tenfold::cpu {
namespace {

// Enough tasks for the threads to balance; the cut depends on shapes alone.
constexpr int64_t kWantedTasks = 64;

std::vector<AttentionTask> make_tasks(const AttentionForward& p, const AttentionGroups& g,
                                      Isa isa) {
  const int64_t tile_rows = TENFOLD_ISA_CALL_AS(isa, attention_tile_rows);
  const int64_t most = TENFOLD_ISA_CALL_AS(isa, attention_most_tiles);
  int64_t tiles = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (const AttentionGroup& group : g.groups)
      tiles +=
          attention_num_tiles(group.num_heads, attention_sequence(p, b).num_queries, tile_rows);
  const int64_t step = std::clamp<int64_t>(tiles / kWantedTasks, 1, most);
  std::vector<AttentionTask> tasks;
  tasks.reserve(tiles / step + p.batch * g.groups.size());
  for (int64_t b = 0; b < p.batch; ++b)
    for (const AttentionGroup& group : g.groups) {
      const int64_t n =
          attention_num_tiles(group.num_heads, attention_sequence(p, b).num_queries, tile_rows);
      // Causal: the last rows have most work and go first, so that the end of the call is balanced.
      for (int64_t end = n; end > 0; end -= step)
        tasks.push_back({group, b, std::max<int64_t>(end - step, 0), end});
    }
  return tasks;
}

double estimated_micros(const AttentionForward& p) {
  double pairs = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const AttentionSequence s = attention_sequence(p, b);
    pairs += static_cast<double>(s.num_queries) * s.num_keys;
  }
  return pairs * p.q_heads * (p.head_dim + p.value_dim) * 1e-5;
}

}  // namespace

void run_attention(const AttentionForward& p) {
  const Isa isa = active_isa();
  const AttentionGroups groups = group_heads(p);
  const auto tasks = make_tasks(p, groups, isa);
  const int64_t scratch_bytes = TENFOLD_ISA_CALL_AS(isa, attention_scratch, p);
  for_each_task(static_cast<int64_t>(tasks.size()), estimated_micros(p), [&] {
    return [&, scratch = std::make_unique<Scratch>(scratch_bytes)](int64_t i) {
      TENFOLD_ISA_CALL_AS(isa, attention_forward_task, p, tasks[i], scratch->data());
    };
  });
}

namespace {

std::tuple<Tensor, Tensor> dha_attention_op(Tensor q, Tensor k, Tensor v, Tensor kmap, Tensor vmap,
                                            std::optional<double> scale, bool causal,
                                            int64_t window_left, OptTensor cu_seqlens_q,
                                            OptTensor cu_seqlens_k, int64_t max_q, int64_t max_k,
                                            OptTensor attn_bias, double softcap,
                                            int64_t window_right) {
  constexpr auto op = "dha_attention";
  const AttentionArgs a{scale,        causal, window_left, window_right, cu_seqlens_q,
                        cu_seqlens_k, max_q,  max_k,       attn_bias,    softcap};
  check_attention(op, q, k, v, kmap, vmap, a);
  const AttentionIndices indices = read_attention_indices(op, q, k, v, kmap, vmap, a);
  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
               v_rows = with_contiguous_rows(v);
  const Tensor out = new_like_rows(q, v.sizes()[v.dim() - 1]), lse = new_lse(q);
  AttentionForward p{};
  static_cast<AttentionParams&>(p) = attention_params(q_rows, k_rows, v_rows, a);
  use_indices(indices, &p);
  p.out = out.data_ptr();
  p.out_at = row_layout(out);
  p.lse = data_as<float>(lse);
  run_attention(p);
  return {out, lse};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("dha_attention", TORCH_BOX(&tenfold::cpu::dha_attention_op));
}
