// SPDX-License-Identifier: Apache-2.0
#include "attention/cpu/attention_host.h"

#include <map>
#include <utility>

#include "attention/head_maps.h"

namespace tenfold::cpu {
namespace {

std::vector<int32_t> read_map(const char* op, const char* arg, const Tensor& map, int64_t heads,
                              const char* what) {
  const auto entries = read_head_map(op, arg, map, heads, what);
  return {entries.begin(), entries.end()};
}

std::vector<int32_t> read_cu_seqlens(const char* op, const char* arg, const Tensor& cu,
                                     int64_t rows) {
  auto at = read_ints<int32_t>(cu);
  TENFOLD_CHECK_VALUE(at[0] == 0, "tenfold::", op, ": ", arg, "[0] must be 0, got ", at[0]);
  for (size_t i = 1; i < at.size(); ++i)
    TENFOLD_CHECK_VALUE(at[i] >= at[i - 1], "tenfold::", op, ": ", arg, " must not fall, got ",
                        at[i - 1], " then ", at[i], " at ", arg, "[", i, "]");
  TENFOLD_CHECK_VALUE(at.back() == rows, "tenfold::", op, ": ", arg, "[", at.size() - 1,
                      "] must be the number of rows ", rows, ", got ", at.back());
  return at;
}

int64_t longest(const std::vector<int32_t>& cu) {
  int64_t most = 0;
  for (size_t i = 1; i < cu.size(); ++i) most = std::max<int64_t>(most, cu[i] - cu[i - 1]);
  return most;
}

}  // namespace

AttentionIndices read_attention_indices(const char* op, const Tensor& q, const Tensor& k,
                                        const Tensor& v, const Tensor& kmap, const Tensor& vmap,
                                        const AttentionArgs& a) {
  AttentionIndices r{read_map(op, "kmap", kmap, k.sizes()[1], "key"),
                     read_map(op, "vmap", vmap, v.sizes()[1], "value"),
                     {},
                     {}};
  if (!a.cu_seqlens_q) return r;
  r.cu_q = read_cu_seqlens(op, "cu_seqlens_q", *a.cu_seqlens_q, q.sizes()[0]);
  r.cu_k = read_cu_seqlens(op, "cu_seqlens_k", *a.cu_seqlens_k, k.sizes()[0]);
  return r;
}

void use_indices(const AttentionIndices& indices, AttentionParams* p) {
  p->kmap = indices.kmap.data();
  p->vmap = indices.vmap.data();
  if (indices.cu_q.empty()) return;
  p->cu_q = indices.cu_q.data();
  p->cu_k = indices.cu_k.data();
  p->max_q = longest(indices.cu_q);
  p->max_k = longest(indices.cu_k);
}

AttentionGroups group_heads(const AttentionParams& p) {
  std::map<std::pair<int32_t, int32_t>, std::vector<int32_t>> members;
  for (int64_t h = 0; h < p.q_heads; ++h)
    members[{p.kmap[h], p.vmap[h]}].push_back(static_cast<int32_t>(h));
  AttentionGroups r;
  r.heads.reserve(p.q_heads);  // the groups point into it
  for (const auto& [of, heads] : members) {
    r.groups.push_back(
        {r.heads.data() + r.heads.size(), static_cast<int64_t>(heads.size()), of.first, of.second});
    r.heads.insert(r.heads.end(), heads.begin(), heads.end());
  }
  return r;
}

}  // namespace tenfold::cpu
