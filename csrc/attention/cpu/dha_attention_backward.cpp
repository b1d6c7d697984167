// SPDX-License-Identifier: Apache-2.0
// CPU registration of dha_attention_backward: tensors -> parameters, tasks over threads, sums over
// the heads that share a key or value head.
//
// A task is one query head of one sequence, or some of its rows. Its shares of dk and dv are
// float32 rows of its own; tasks run in waves, and after each wave its shares are added up in the
// order of the tasks. So the result depends neither on the threads nor on the size of a wave, and
// the memory is that of one wave.
#include "attention/cpu/dha_attention_backward.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "attention/cpu/attention_host.h"
#include "core/scratch.h"

namespace tenfold::cpu {
namespace {

constexpr auto kOp = "dha_attention_backward";

struct Work {
  AttentionBackward p;
  std::vector<AttentionBackwardTask> tasks;  // ordered by sequence, then key head
};

KeyRange keys_of_rows(const AttentionParams& p, const AttentionSequence& s, int64_t begin,
                      int64_t end) {
  const auto first = visible_keys(p.mask, begin, s.num_queries, s.num_keys).first;
  const auto last = visible_keys(p.mask, end - 1, s.num_queries, s.num_keys).last;
  const auto block = first / kBackwardBlock * kBackwardBlock;
  return last > first ? KeyRange{block, last} : KeyRange{0, 0};
}

// Where the rows of a head are cut into tasks of equal work: by the sequence's own shape alone, so
// that results depend on nothing else.
constexpr int64_t kWantedTasks = 32, kLeastRows = 2 * kBackwardBlock;

std::vector<int64_t> cut_rows(const AttentionParams& p, const AttentionSequence& s) {
  const int64_t wanted = (kWantedTasks + p.q_heads - 1) / std::max<int64_t>(p.q_heads, 1);
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, s.num_queries / kLeastRows));
  std::vector<int64_t> cuts{0};
  if (parts > 1) {
    constexpr int64_t kStep = kBackwardBlock / 2;
    std::vector<double> work{0.0};
    for (int64_t row = 0; row < s.num_queries; row += kStep) {
      const auto k = visible_keys(p.mask, row, s.num_queries, s.num_keys);
      work.push_back(work.back() + static_cast<double>(std::max<int64_t>(k.last - k.first, 0)) + 1);
    }
    for (int64_t i = 1; i < parts; ++i) {
      const auto at = std::lower_bound(work.begin(), work.end(), work.back() * i / parts);
      const int64_t row = (at - work.begin()) * kStep;
      if (row > cuts.back() && row < s.num_queries) cuts.push_back(row);
    }
  }
  cuts.push_back(s.num_queries);
  return cuts;
}

void make_tasks(Work& w) {
  std::vector<int64_t> heads(w.p.q_heads);  // heads that share a key head follow each other
  std::iota(heads.begin(), heads.end(), 0);
  std::stable_sort(heads.begin(), heads.end(),
                   [&](int64_t a, int64_t b) { return w.p.kmap[a] < w.p.kmap[b]; });
  for (int64_t b = 0; b < w.p.batch; ++b) {
    const AttentionSequence s = attention_sequence(w.p, b);
    if (s.num_queries == 0) continue;
    const auto cuts = cut_rows(w.p, s);
    for (const int64_t head : heads)
      for (size_t i = 0; i + 1 < cuts.size(); ++i) {
        const auto keys = keys_of_rows(w.p, s, cuts[i], cuts[i + 1]);
        AttentionBackwardTask t{};
        t.batch = b, t.head = head;
        t.q_first = s.q_first, t.k_first = s.k_first;
        t.num_queries = s.num_queries, t.num_keys = s.num_keys;
        t.row_begin = cuts[i], t.row_end = cuts[i + 1];
        t.key_begin = keys.first, t.key_end = keys.last;
        w.tasks.push_back(t);
      }
  }
}

double work_of(const AttentionParams& p, const AttentionBackwardTask& t) {
  double pairs = 0;
  for (int64_t row = t.row_begin; row < t.row_end; row += kBackwardBlock) {
    const auto k = visible_keys(p.mask, row, t.num_queries, t.num_keys);
    pairs += static_cast<double>(std::max<int64_t>(k.last - k.first, 1) * kBackwardBlock);
  }
  return pairs * static_cast<double>(3 * p.head_dim + 2 * p.value_dim);
}

int64_t share_floats(const AttentionParams& p, const AttentionBackwardTask& t) {
  const int64_t rows = (t.key_end - t.key_begin + kBackwardBlock - 1) / kBackwardBlock;
  return rows * kBackwardBlock * (backward_pitch(p.head_dim) + backward_pitch(p.value_dim));
}

int64_t task_scratch(Isa isa, const AttentionBackward& p) {
#if defined(TENFOLD_X86)
  if (attention_backward_by_tiles(isa, p)) return avx512_amx::attention_backward_tiles_scratch(p);
#endif
  return TENFOLD_ISA_CALL_AS(isa, attention_backward_scratch, p);
}

void run_task(Isa isa, const AttentionBackward& p, const AttentionBackwardTask& t) {
#if defined(TENFOLD_X86)
  if (attention_backward_by_tiles(isa, p)) return avx512_amx::attention_backward_tiles_task(p, t);
#endif
  TENFOLD_ISA_CALL_AS(isa, attention_backward_task, p, t);
}

// Runs tasks [begin, end), the largest first; threads take the next one as they finish.
void run_tasks(Isa isa, const Work& w, int64_t begin, int64_t end) {
  std::vector<int64_t> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  std::vector<double> work(end - begin);
  for (int64_t i = begin; i < end; ++i) work[i - begin] = work_of(w.p, w.tasks[i]);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return work[a - begin] > work[b - begin]; });
  const double micros = std::accumulate(work.begin(), work.end(), 0.0) * 2e-5;
  const int64_t bytes = task_scratch(isa, w.p);
  for_each_task(end - begin, micros, [&] {
    return [&, scratch = std::make_unique<Scratch>(bytes)](int64_t i) {
      AttentionBackwardTask t = w.tasks[order[i]];
      t.scratch = scratch->data();
      run_task(isa, w.p, t);
    };
  });
}

// One of dk and dv.
struct Gradient {
  void* out;
  RowLayout at;
  int64_t heads, dim;
  float scale;
  const int32_t* map;
  float* AttentionBackwardTask::* share;
  std::vector<int64_t> last;  // [sequences * heads]: the last task that adds to it, -1 if none
  std::vector<bool> begun;    // [sequences * heads]: an earlier wave has added to it
  float* acc = nullptr;       // sums of half-precision heads between waves, laid out as `out`

  int64_t index(const AttentionBackwardTask& t) const { return t.batch * heads + map[t.head]; }
};

Gradient make_gradient(const Work& w, void* out, const RowLayout& at, int64_t heads, int64_t dim,
                       float scale, const int32_t* map, float* AttentionBackwardTask::* share) {
  Gradient g{out, at, heads, dim, scale, map, share, {}, {}};
  g.last.assign(w.p.batch * heads, -1);
  g.begun.assign(w.p.batch * heads, false);
  for (size_t i = 0; i < w.tasks.size(); ++i) g.last[g.index(w.tasks[i])] = static_cast<int64_t>(i);
  return g;
}

constexpr int64_t kSumRows = 64;

// Sums of some heads, cut into pieces of kSumRows rows.
struct Sums {
  std::vector<GradientSum> heads;
  std::vector<std::vector<GradientShare>> shares;
  std::vector<std::pair<int64_t, int64_t>> pieces;  // head, first row
  std::vector<int64_t> num_rows;

  void add(const Work& w, Gradient& g, int64_t index, std::vector<GradientShare> of_wave,
           bool final) {
    const AttentionSequence s = attention_sequence(w.p, index / g.heads);
    const int64_t row0 =
        index / g.heads * g.at.batch + index % g.heads * g.at.head + s.k_first * g.at.row;
    GradientSum sum{};
    sum.pitch = backward_pitch(g.dim), sum.dim = g.dim, sum.scale = g.scale;
    sum.out = static_cast<char*>(g.out) + row0 * dtype_size(w.p.dtype);
    sum.out_row = g.at.row, sum.dtype = w.p.dtype;
    // float32 gradients hold their own sums.
    float* const acc = w.p.dtype == Dtype::f32 ? static_cast<float*>(sum.out) : g.acc + row0;
    sum.acc_row = g.at.row;
    sum.acc_in = g.begun[index] ? acc : nullptr;
    sum.acc_out = final ? nullptr : acc;
    g.begun[index] = true;
    const int64_t rows = w.p.cu_k != nullptr ? s.num_keys : w.p.max_k;
    for (int64_t row = 0; row < rows; row += kSumRows)
      pieces.emplace_back(static_cast<int64_t>(heads.size()), row);
    heads.push_back(sum), shares.push_back(std::move(of_wave)), num_rows.push_back(rows);
  }

  void run(Isa isa) const {
    if (pieces.empty()) return;
    const double reads = 2.0 + static_cast<double>(shares.back().size());
    const double micros = 1e-4 * kSumRows * static_cast<double>(heads.back().dim) * reads;
    parallel_for(static_cast<int64_t>(pieces.size()), micros, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [head, row] = pieces[i];
        GradientSum sum = heads[head];
        sum.shares = shares[head].data(),
        sum.num_shares = static_cast<int64_t>(shares[head].size());
        sum.row_begin = row, sum.row_end = std::min(row + kSumRows, num_rows[head]);
        TENFOLD_ISA_CALL_AS(isa, sum_gradient, sum);
      }
    });
  }
};

// Adds up what the tasks [begin, end) have left, head by head in the order of the tasks.
void sum_wave(Isa isa, const Work& w, std::initializer_list<Gradient*> gradients, int64_t begin,
              int64_t end) {
  Sums sums;
  for (Gradient* g : gradients) {
    std::vector<std::pair<int64_t, int64_t>> order;  // head, task
    for (int64_t i = begin; i < end; ++i) order.emplace_back(g->index(w.tasks[i]), i);
    std::sort(order.begin(), order.end());
    for (size_t i = 0; i < order.size();) {
      const int64_t index = order[i].first;
      std::vector<GradientShare> shares;
      for (; i < order.size() && order[i].first == index; ++i) {
        const AttentionBackwardTask& t = w.tasks[order[i].second];
        shares.push_back({t.*(g->share), t.key_begin, t.key_end});
      }
      sums.add(w, *g, index, std::move(shares), g->last[index] < end);
    }
  }
  sums.run(isa);
}

void clear_unused(Isa isa, const Work& w, std::initializer_list<Gradient*> gradients) {
  Sums sums;
  for (Gradient* g : gradients)
    for (size_t i = 0; i < g->last.size(); ++i)
      if (g->last[i] < 0) sums.add(w, *g, static_cast<int64_t>(i), {}, true);
  sums.run(isa);
}

// Ends of the waves: as many tasks as fit into kWaveFloats of shares, but one for every thread.
// Tasks by AMX tiles are so quick that to touch fresh memory would cost more: few at a time, whose
// shares stay in the caches.
constexpr int64_t kWaveFloats = int64_t{8} << 20, kTilesWaveFloats = int64_t{1} << 20;

std::vector<int64_t> make_waves(Isa isa, const Work& w, int64_t* most_floats) {
  const int64_t wave = attention_backward_by_tiles(isa, w.p) ? kTilesWaveFloats : kWaveFloats;
  const int64_t threads = torch::stable::get_num_threads();
  const auto num_tasks = static_cast<int64_t>(w.tasks.size());
  std::vector<int64_t> ends;
  *most_floats = 0;
  for (int64_t begin = 0; begin < num_tasks;) {
    int64_t end = begin, floats = 0;
    while (end < num_tasks) {
      const int64_t more = share_floats(w.p, w.tasks[end]);
      if (end - begin >= threads && floats + more > wave) break;
      floats += more, ++end;
    }
    if (end < num_tasks) end -= (end - begin) % threads;  // no thread is left over
    *most_floats = std::max(*most_floats, floats);
    ends.push_back(begin = end);
  }
  return ends;
}

// Adds the sums by distance of tasks [begin, end) to those of their heads, in order.
void sum_distances(const Work& w, int64_t begin, int64_t end, float* distances) {
  const int64_t pitch = w.p.relative.head;
  parallel_for(w.p.q_heads, 1e-4 * static_cast<double>((end - begin) * pitch),
               [&](int64_t first, int64_t last) {
                 for (int64_t i = begin; i < end; ++i) {
                   const AttentionBackwardTask& t = w.tasks[i];
                   if (t.head < first || t.head >= last) continue;
                   float* const to = distances + t.head * pitch;
                   for (int64_t at = 0; at < pitch; ++at) to[at] += t.distances[at];
                 }
               });
}

void run(Isa isa, Work& w, const Tensor& dk, const Tensor& dv, float* distances) {
  const AttentionBackward& p = w.p;
  Gradient k = make_gradient(w, p.dk, p.dk_at, p.k_heads, p.head_dim, p.scale, p.kmap,
                             &AttentionBackwardTask::dk);
  Gradient v = make_gradient(w, p.dv, p.dv_at, p.v_heads, p.value_dim, 1.0f, p.vmap,
                             &AttentionBackwardTask::dv);
  clear_unused(isa, w, {&k, &v});
  int64_t floats;
  const auto waves = make_waves(isa, w, &floats);
  if (waves.empty()) return;
  int64_t most_tasks = 0;
  for (size_t i = 0; i < waves.size(); ++i)
    most_tasks = std::max(most_tasks, waves[i] - (i > 0 ? waves[i - 1] : 0));
  const int64_t pitch = distances != nullptr ? p.relative.head : 0;
  const Scratch by_distance(most_tasks * pitch * 4 + 64);
  const Scratch shares(floats * 4);
  Tensor k_acc, v_acc;
  if (waves.size() > 1 && p.dtype != Dtype::f32) {
    k_acc = new_output(dk, {dk.numel()}, ScalarType::Float);
    v_acc = new_output(dk, {dv.numel()}, ScalarType::Float);
    k.acc = data_as<float>(k_acc), v.acc = data_as<float>(v_acc);
  }
  int64_t begin = 0;
  for (const int64_t end : waves) {
    auto* at = static_cast<float*>(shares.data());
    for (int64_t i = begin; i < end; ++i) {
      AttentionBackwardTask& t = w.tasks[i];
      const int64_t all = share_floats(p, t);
      const int64_t k_pitch = backward_pitch(p.head_dim), v_pitch = backward_pitch(p.value_dim);
      if (distances != nullptr)
        t.distances = static_cast<float*>(by_distance.data()) + (i - begin) * pitch;
      t.dk = at, t.dv = at + all / (k_pitch + v_pitch) * k_pitch;
      at += all;
    }
    run_tasks(isa, w, begin, end);
    sum_wave(isa, w, {&k, &v}, begin, end);
    if (distances != nullptr) sum_distances(w, begin, end, distances);
    begin = end;
  }
}

}  // namespace

void set_gradients(const Tensor& out, const Tensor& dout, const Tensor& dq, const Tensor& dk,
                   const Tensor& dv, AttentionBackward* p) {
  p->out = out.data_ptr(), p->out_at = row_layout(out);
  p->dout = dout.data_ptr(), p->dout_at = row_layout(dout);
  p->dq = dq.data_ptr(), p->dk = dk.data_ptr(), p->dv = dv.data_ptr();
  p->dq_at = row_layout(dq), p->dk_at = row_layout(dk), p->dv_at = row_layout(dv);
}

void run_attention_backward(Isa isa, const AttentionBackward& p, const Tensor& dk, const Tensor& dv,
                            float* distances) {
  Work w{p, {}};
  make_tasks(w);
  run(isa, w, dk, dv, distances);
}

namespace {

#if defined(TENFOLD_X86)
// Nothing is infinite or NaN in bf16 tensors [.., H, .., D] of contiguous rows: a pass over them,
// which is little beside products of each row with each other.
bool all_finite(std::initializer_list<Tensor> tensors) {
  std::atomic<bool> finite{true};
  for (const Tensor& x : tensors) {
    const RowLayout at = row_layout(x);
    const bool dense = x.dim() == 4;
    const int64_t heads = x.sizes()[1], dim = x.sizes().back();
    const int64_t rows = dense ? x.sizes()[2] : x.sizes()[0];
    const int64_t count = dense ? x.sizes()[0] * heads : heads;
    const auto* const data = static_cast<const bf16_t*>(x.data_ptr());
    parallel_for(count, static_cast<double>(rows * dim) * 2e-4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && finite; ++i) {
        const bf16_t* row = data + i / heads * at.batch + i % heads * at.head;
        bool good = true;
        for (int64_t r = 0; r < rows; ++r, row += at.row)
          good = good && avx512_amx::all_finite(row, dim);
        if (!good) finite = false;
      }
    });
  }
  return finite;
}
#endif

std::tuple<Tensor, Tensor, Tensor> dha_attention_backward(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor kmap, Tensor vmap,
    std::optional<double> scale, bool causal, int64_t window_left, OptTensor cu_seqlens_q,
    OptTensor cu_seqlens_k, int64_t max_q, int64_t max_k, OptTensor attn_bias, double softcap,
    int64_t window_right, OptTensor dlse, bool /*deterministic: always*/) {
  const AttentionArgs args{scale,        causal, window_left, window_right, cu_seqlens_q,
                           cu_seqlens_k, max_q,  max_k,       attn_bias,    softcap};
  check_attention(kOp, q, k, v, kmap, vmap, args);
  check_attention_backward(kOp, dout, q, v, out, lse, dlse, cu_seqlens_q.has_value());
  const AttentionIndices indices = read_attention_indices(kOp, q, k, v, kmap, vmap, args);
  const Tensor rows[] = {with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v),
                         with_contiguous_rows(out), with_contiguous_rows(dout)};
  const Tensor lse_rows = torch::stable::contiguous(lse);
  const Tensor dlse_rows = dlse ? torch::stable::contiguous(*dlse) : Tensor();
  AttentionBackward p{};
  static_cast<AttentionParams&>(p) = attention_params(rows[0], rows[1], rows[2], args);
  use_indices(indices, &p);
  const Tensor dq = new_like_rows(q, p.head_dim), dk = new_like_rows(k, p.head_dim);
  const Tensor dv = new_like_rows(v, p.value_dim);
  set_gradients(rows[3], rows[4], dq, dk, dv, &p);
  p.lse = data_as<float>(lse_rows), p.dlse = dlse ? data_as<float>(dlse_rows) : nullptr;
  const Isa isa = active_isa();
#if defined(TENFOLD_X86)
  p.by_tiles = isa == Isa::avx512_amx && p.dtype == Dtype::bf16 && p.softcap == 0.0f &&
               p.bias.kind == BiasKind::none && all_finite({rows[0], rows[1], rows[2], rows[4]});
#endif
  run_attention_backward(isa, p, dk, dv, nullptr);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("dha_attention_backward", TORCH_BOX(&tenfold::cpu::dha_attention_backward));
}
