// SPDX-License-Identifier: Apache-2.0
// CPU registration of proxy_scores: tensors -> parameters, tasks over threads, final reduction.
#include "kv_eviction/proxy_scores.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "kv_eviction/cpu/impl.h"

namespace tenfold::cpu {

KvRange read_kv_range(const char* op, const OptTensor& kv_start, const OptTensor& kv_lens,
                      int64_t batch, int64_t length) {
  KvRange r;
  const auto start = kv_start ? read_ints<int64_t>(*kv_start) : std::vector<int64_t>(batch, 0);
  const auto lens = kv_lens ? read_ints<int64_t>(*kv_lens) : std::vector<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = kv_lens ? lens[b] : length - start[b];
    TENFOLD_CHECK_VALUE(start[b] >= 0 && start[b] <= length, "tenfold::", op, ": kv_start[", b,
                        "] must be in [0, L = ", length, "], got ", start[b]);
    TENFOLD_CHECK_VALUE(n >= 0 && n <= length - start[b], "tenfold::", op, ": kv_lens[", b,
                        "] must be in [0, L - kv_start = ", length - start[b], "], got ", n);
    r.begin.push_back(static_cast<int32_t>(start[b]));
    r.end.push_back(static_cast<int32_t>(start[b] + n));
  }
  return r;
}

namespace {

// Slot of every proxy; anything outside the valid range is inactive and becomes -1.
std::vector<int32_t> proxy_slots(const ProxyScoresArgs& a, int64_t batch, int64_t w,
                                 int64_t length) {
  std::vector<int64_t> given;
  if (a.q_positions) given = read_ints<int64_t>(*a.q_positions);
  const bool per_row = a.q_positions && a.q_positions->dim() == 2;
  const int64_t first = a.q_offset == -1 ? length - w : a.q_offset;
  std::vector<int32_t> slots(batch * w);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < w; ++i) {
      const int64_t at = given.empty() ? first + i : given[per_row ? b * w + i : i];
      slots[b * w + i] = at < 0 || at >= length ? -1 : static_cast<int32_t>(at);
    }
  return slots;
}

struct HeadGroups {
  std::vector<int32_t> list, begin;
};

HeadGroups group_heads(const char* op, const OptTensor& kmap, int64_t hq, int64_t hkv) {
  std::vector<int64_t> of(hq);
  if (kmap) {
    of = read_ints<int64_t>(*kmap);
    for (int64_t h = 0; h < hq; ++h)
      TENFOLD_CHECK_INDEX(of[h] >= 0 && of[h] < hkv, "tenfold::", op, ": kmap[", h,
                          "] must be a key head in [0, ", hkv, "), got ", of[h]);
  } else {
    for (int64_t h = 0; h < hq; ++h) of[h] = h / (hq / hkv);
  }
  HeadGroups g;
  for (int64_t key = 0; key < hkv; ++key) {
    g.begin.push_back(static_cast<int32_t>(g.list.size()));
    for (int64_t h = 0; h < hq; ++h)
      if (of[h] == key) g.list.push_back(static_cast<int32_t>(h));
  }
  g.begin.push_back(static_cast<int32_t>(g.list.size()));
  return g;
}

// A sequence's work is cut into tasks by its own shape alone, so results depend neither on the
// number of threads nor on the rest of the batch. With `max` a task is one query head (its column
// sums must be complete before the maximum). Else: enough tasks for a small machine at the price of
// reading K once more each, for a large one only where a task keeps many row tiles per reading.
constexpr int64_t kWantedTasks = 8, kMostTasks = 64, kLeastTiles = 2, kManyTiles = 8;

std::vector<ProxyScoresTask> make_tasks(const ProxyScoresParams& p, const HeadGroups& g, Isa isa) {
  std::vector<ProxyScoresTask> tasks;
  const int64_t tile = TENFOLD_ISA_CALL_AS(isa, proxy_scores_tile_rows), heads = p.kv_heads;
  for (int64_t pair = 0; pair < p.batch * p.kv_heads; ++pair) {
    const int64_t h = pair % p.kv_heads;
    const int64_t rows = (g.begin[h + 1] - g.begin[h]) * p.num_proxies;
    const int64_t tiles = (rows + tile - 1) / tile;
    const int64_t few = std::min((kWantedTasks + heads - 1) / heads, tiles / kLeastTiles);
    const int64_t many = std::min((kMostTasks + heads - 1) / heads, tiles / kManyTiles);
    const int64_t parts = std::max({few, many, int64_t{1}});
    const int64_t step =
        p.reduce == ScoreReduce::max ? p.num_proxies : (tiles + parts - 1) / parts * tile;
    for (int64_t row = 0; row < rows; row += step)
      tasks.push_back({pair / p.kv_heads, h, row, std::min(row + step, rows), nullptr, nullptr});
  }
  return tasks;
}

// Adds the column sums of a key head's later tasks to its scores, which hold those of the first, in
// a fixed order.
void reduce_tasks(const ProxyScoresParams& p, const ProxyScoresTask* tasks, int64_t n,
                  int64_t num_heads, float* out) {
  for (int64_t i = 1; i < n; ++i) {
    const float* from = tasks[i].partial;
    if (p.reduce == ScoreReduce::max) {
      for (int64_t j = 0; j < p.length; ++j)
        out[j] = from[j] > out[j] || from[j] != from[j] ? from[j] : out[j];
    } else {
      for (int64_t j = 0; j < p.length; ++j) out[j] += from[j];
    }
  }
  if (p.reduce != ScoreReduce::mean || n == 0) return;
  const auto heads = static_cast<float>(num_heads);
  for (int64_t j = 0; j < p.length; ++j) out[j] /= heads;
}

// Calls use(pair, first, count) for the tasks of every (sequence, key head).
template <class Use>
void for_each_pair(const ProxyScoresParams& p, const std::vector<ProxyScoresTask>& tasks,
                   const Use& use) {
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  int64_t at = 0;
  for (int64_t pair = 0; pair < p.batch * p.kv_heads; ++pair) {
    const int64_t first = at;
    while (at < num_tasks && tasks[at].b * p.kv_heads + tasks[at].h == pair) ++at;
    use(pair, first, at - first);
  }
}

void run(ProxyScoresParams& p, const HeadGroups& groups) {
  const Isa isa = active_isa();
  auto tasks = make_tasks(p, groups, isa);
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  int64_t num_partials = 0;  // the first task of a pair writes where the scores go
  for_each_pair(p, tasks, [&](int64_t, int64_t, int64_t n) { num_partials += n > 1 ? n - 1 : 0; });
  const Scratch partials(num_partials * p.length * 4);
  auto* partial = static_cast<float*>(partials.data());
  for_each_pair(p, tasks, [&](int64_t pair, int64_t first, int64_t n) {
    float* const scores = p.scores + pair * p.length;
    if (n == 0) std::fill(scores, scores + p.length, 0.0f);
    for (int64_t i = first; i < first + n; ++i) {
      tasks[i].partial = i == first ? scores : partial;
      partial += i == first ? 0 : p.length;
    }
  });
  const int64_t scratch_bytes = TENFOLD_ISA_CALL_AS(isa, proxy_scores_scratch, p);
  const double rows = static_cast<double>(p.q_heads * p.num_proxies * p.batch);
  const double micros = rows * p.length * p.head_dim * 2e-5 / std::max<int64_t>(num_tasks, 1);
  parallel_for(num_tasks, micros, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) {
      std::memset(tasks[i].partial, 0, p.length * 4);
      tasks[i].scratch = scratch.data();
      TENFOLD_ISA_CALL_AS(isa, proxy_scores_task, p, tasks[i]);
    }
  });
  for_each_pair(p, tasks, [&](int64_t pair, int64_t first, int64_t n) {
    const int64_t h = pair % p.kv_heads;
    reduce_tasks(p, tasks.data() + first, n, groups.begin[h + 1] - groups.begin[h],
                 p.scores + pair * p.length);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> proxy_scores(const char* op, const Tensor& q_in, const Tensor& k_in,
                                        const ProxyScoresArgs& a) {
  const ScoreReduce reduce = check_proxy_scores(op, q_in, k_in, a);
  const int64_t b = q_in.sizes()[0], hq = q_in.sizes()[1], w = q_in.sizes()[2];
  const int64_t hkv = k_in.sizes()[1], length = k_in.sizes()[2];
  const auto range = read_kv_range(op, a.kv_start, a.kv_lens, b, length);
  const auto groups = group_heads(op, a.kmap, hq, hkv);
  const auto slots = proxy_slots(a, b, w, length);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in);
  const Tensor scores = new_output(q, {b, hkv, length}, ScalarType::Float);
  const Tensor lse_in = a.lse ? torch::stable::contiguous(*a.lse) : Tensor();
  const Tensor lse = new_output(q, {b, hq, w}, ScalarType::Float);
  ProxyScoresParams p{};
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.lse_in = a.lse ? data_as<float>(lse_in) : nullptr;
  p.scores = data_as<float>(scores);
  p.lse_out = data_as<float>(lse);
  p.dtype = to_dtype(q.scalar_type());
  p.batch = b, p.q_heads = hq, p.kv_heads = hkv, p.num_proxies = w, p.length = length;
  p.head_dim = q.sizes()[3];
  for (int i = 0; i < 3; ++i) p.q_stride[i] = q.strides()[i], p.k_stride[i] = k.strides()[i];
  p.positions = slots.data();
  p.kv_begin = range.begin.data();
  p.kv_end = range.end.data();
  p.head_list = groups.list.data();
  p.head_begin = groups.begin.data();
  p.scale = static_cast<float>(a.scale);
  p.causal = a.causal;
  p.window = static_cast<int32_t>(std::min<int64_t>(a.window, length));
  p.reduce = reduce;
  if (a.lse && lse.numel() > 0)
    std::memcpy(lse.data_ptr(), lse_in.data_ptr(), static_cast<size_t>(lse.numel()) * 4);
  run(p, groups);
  return {scores, lse};
}

namespace {

std::tuple<Tensor, Tensor> proxy_scores_op(Tensor q, Tensor k, OptTensor lse, double scale,
                                           bool causal, int64_t q_offset, OptTensor q_positions,
                                           OptTensor kv_start, OptTensor kv_lens, int64_t window,
                                           std::string_view reduce, OptTensor kmap) {
  return proxy_scores(
      "proxy_scores", q, k,
      {lse, scale, causal, q_offset, q_positions, kv_start, kv_lens, window, reduce, kmap});
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("proxy_scores", TORCH_BOX(&tenfold::cpu::proxy_scores_op));
}
