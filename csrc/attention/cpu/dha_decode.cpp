// SPDX-License-Identifier: Apache-2.0
// CPU registration of dha_decode: maps -> components of heads -> parts of the keys over threads ->
// combination in order.
#include "attention/dha_decode.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention/decode_ops.h"
#include "attention/head_maps.h"
#include "core/cpu/decode.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

constexpr auto kOp = "dha_decode";

// Query heads that share key heads or value heads, directly or through others, and those heads. GQA
// has one component per KV head, arbitrary maps mostly one in all. Components share no memory.
struct Component {
  std::vector<DecodeHead> key_heads, value_heads;
  std::vector<int32_t> value_rows;
  std::vector<int64_t> q_heads;  // in the order of the rows: by key head; Sq rows each
  int64_t rows = 0;
};

// Component of every query head: union-find over key heads [0, HK) and value heads [HK, HK + HV).
std::vector<int64_t> component_roots(const DhaDecodeParams& p, const std::vector<int64_t>& kmap,
                                     const std::vector<int64_t>& vmap) {
  std::vector<int64_t> parent(p.k_heads + p.v_heads);
  std::iota(parent.begin(), parent.end(), 0);
  const auto root = [&](int64_t x) {
    while (parent[x] != x) x = parent[x] = parent[parent[x]];
    return x;
  };
  for (int64_t h = 0; h < p.q_heads; ++h) {
    const int64_t a = root(kmap[h]), b = root(p.k_heads + vmap[h]);
    parent[std::max(a, b)] = std::min(a, b);
  }
  std::vector<int64_t> roots(p.q_heads);
  for (int64_t h = 0; h < p.q_heads; ++h) roots[h] = root(kmap[h]);
  return roots;
}

Component make_component(const DhaDecodeParams& p, const std::vector<int64_t>& heads,
                         const std::vector<int64_t>& kmap, const std::vector<int64_t>& vmap) {
  Component c;
  c.q_heads = heads;
  std::stable_sort(c.q_heads.begin(), c.q_heads.end(),
                   [&](int64_t a, int64_t b) { return kmap[a] < kmap[b]; });
  const int64_t sq = p.num_queries, n = static_cast<int64_t>(heads.size());
  c.rows = n * sq;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t offset = kmap[c.q_heads[i]] * p.k.head;
    if (i == 0 || kmap[c.q_heads[i]] != kmap[c.q_heads[i - 1]])
      c.key_heads.push_back({offset, i * sq, 0});
    c.key_heads.back().num_rows += sq;
  }
  std::vector<int64_t> by_value(n);
  std::iota(by_value.begin(), by_value.end(), 0);
  std::stable_sort(by_value.begin(), by_value.end(),
                   [&](int64_t a, int64_t b) { return vmap[c.q_heads[a]] < vmap[c.q_heads[b]]; });
  for (int64_t i = 0; i < n; ++i) {
    const int64_t head = vmap[c.q_heads[by_value[i]]];
    if (i == 0 || head != vmap[c.q_heads[by_value[i - 1]]])
      c.value_heads.push_back({head * p.v.head, i * sq, 0});
    c.value_heads.back().num_rows += sq;
    for (int64_t s = 0; s < sq; ++s)
      c.value_rows.push_back(static_cast<int32_t>(by_value[i] * sq + s));
  }
  return c;
}

std::vector<Component> find_components(const DhaDecodeParams& p, const std::vector<int64_t>& kmap,
                                       const std::vector<int64_t>& vmap) {
  const auto roots = component_roots(p, kmap, vmap);
  std::vector<Component> components;
  for (int64_t root = 0; root < p.k_heads; ++root) {
    std::vector<int64_t> heads;
    for (int64_t h = 0; h < p.q_heads; ++h)
      if (roots[h] == root) heads.push_back(h);
    if (!heads.empty()) components.push_back(make_component(p, heads, kmap, vmap));
  }
  return components;
}

// The tokens of one sequence: [first, length) are seen by some row. `base` is the slot of token 0
// (contiguous, paged) or its row (ragged).
struct Sequence {
  int64_t base, first, length;
};

struct Indices {
  std::vector<Sequence> sequences;
  std::vector<int64_t> blocks;  // block_table
  int64_t max_blocks = 0;
};

void check_blocks(const DhaDecodeParams& p, const Indices& at, int64_t b) {
  const Sequence& s = at.sequences[b];
  if (s.length == s.first) return;
  const int64_t last = (s.base + s.length - 1) / p.block_size;
  for (int64_t i = (s.base + s.first) / p.block_size; i <= last; ++i) {
    const int64_t block = at.blocks[b * at.max_blocks + i];
    TENFOLD_CHECK_VALUE(block >= 0 && block < p.num_blocks, "tenfold::", kOp, ": block_table[", b,
                        "][", i, "] must be in [0, ", p.num_blocks, "), got ", block);
  }
}

Indices read_indices(const DhaDecodeParams& p, const Tensor& kv_lens, const DhaDecodeArgs& a) {
  const auto lens = read_ints<int64_t>(kv_lens);
  const auto start = a.kv_start ? read_ints<int64_t>(*a.kv_start) : std::vector<int64_t>(p.batch);
  const auto offsets = a.offsets ? read_ints<int64_t>(*a.offsets) : std::vector<int64_t>();
  Indices at;
  if (a.block_table) {
    at.blocks = read_ints<int64_t>(*a.block_table);
    at.max_blocks = a.block_table->sizes()[1];
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t base = start[b], room = p.length - base;
    TENFOLD_CHECK_VALUE(base >= 0 && base <= p.length, "tenfold::", kOp, ": kv_start[", b,
                        "] must be in [0, ", p.length, "], got ", base);
    if (a.offsets) {
      base = offsets[b], room = offsets[b + 1] - base;
      TENFOLD_CHECK_VALUE(base >= 0 && room >= 0 && offsets[b + 1] <= p.length, "tenfold::", kOp,
                          ": offsets must ascend within [0, N = ", p.length, "], got ", base,
                          " then ", offsets[b + 1], " at ", b);
    }
    TENFOLD_CHECK_VALUE(lens[b] >= 0 && lens[b] <= room, "tenfold::", kOp, ": kv_lens[", b,
                        "] must be in [0, ", room, "], got ", lens[b]);
    const int64_t hidden =
        p.window_left < 0 ? 0 : std::max<int64_t>(0, lens[b] - p.num_queries - p.window_left);
    at.sequences.push_back({base, hidden, lens[b]});
    if (a.block_table) check_blocks(p, at, b);
  }
  return at;
}

// A part of the keys of one sequence for one component.
struct Part {
  int64_t batch, component, first, num_keys;
};

// Tokens per part: enough bytes to amortise a task and its share of the combination, few enough
// that some threads share one long sequence.
int64_t part_keys(const DhaDecodeParams& p, const Component& c, int64_t num_keys) {
  constexpr int64_t kPartBytes = int64_t{1} << 20, kLeast = 256, kMost = 4096;
  if (p.num_splits > 0) return (num_keys + p.num_splits - 1) / p.num_splits;
  const int64_t bytes = (static_cast<int64_t>(c.key_heads.size()) * p.head_dim +
                         static_cast<int64_t>(c.value_heads.size()) * p.value_dim) *
                        dtype_size(p.dtype);
  const int64_t keys = kPartBytes / bytes / kDecodeKeyBlock * kDecodeKeyBlock;
  return std::clamp(keys, kLeast, kMost);
}

// One call: everything that its tasks read.
struct Call {
  DhaDecodeParams p;
  const char* k;
  const char* v;
  std::vector<Component> components;
  Indices at;
  std::vector<Part> parts;
  std::vector<int64_t> partial_at;  // floats before the result of every part
  std::vector<int64_t> first_part;  // [batch * components + 1]
  std::vector<float> queries;       // [batch][component][rows][pitch]
  std::vector<int64_t> query_at;    // floats before every component in a sequence's queries
  int64_t queries_of_sequence = 0;
};

void load_queries(Call& c, const Tensor& q) {
  const DhaDecodeParams& p = c.p;
  const int64_t size = dtype_size(p.dtype), pitch = decode_pitch(p.head_dim);
  for (const Component& component : c.components) {
    c.query_at.push_back(c.queries_of_sequence);
    c.queries_of_sequence += component.rows * pitch;
  }
  c.queries.resize(p.batch * c.queries_of_sequence);
  float* to = c.queries.data();
  const char* from = static_cast<const char*>(q.data_ptr());
  for (int64_t b = 0; b < p.batch; ++b)
    for (const Component& component : c.components)
      for (const int64_t h : component.q_heads)
        for (int64_t s = 0; s < p.num_queries; ++s, to += pitch)
          decode_load_query(from + (b * p.q_batch + h * p.q_head + s * p.q_query) * size, p.dtype,
                            p.q_dim, p.head_dim, to);
}

void make_parts(Call& c) {
  int64_t floats = 0;
  for (int64_t b = 0; b < c.p.batch; ++b) {
    const Sequence& s = c.at.sequences[b];
    for (size_t i = 0; i < c.components.size(); ++i) {
      c.first_part.push_back(static_cast<int64_t>(c.parts.size()));
      const int64_t step = part_keys(c.p, c.components[i], s.length - s.first);
      for (int64_t at = s.first; at < s.length; at += step) {
        c.parts.push_back({b, static_cast<int64_t>(i), at, std::min(step, s.length - at)});
        c.partial_at.push_back(floats);
        floats += decode_partial(c.components[i].rows, c.p.value_dim);
      }
    }
  }
  c.first_part.push_back(static_cast<int64_t>(c.parts.size()));
  c.partial_at.push_back(floats);
}

// Tokens [first, first + n) of a sequence as runs of constant stride.
void find_runs(const Call& c, const Part& part, std::vector<DecodeRun>& runs) {
  const DhaDecodeParams& p = c.p;
  const int64_t size = dtype_size(p.dtype);
  int64_t slot = c.at.sequences[part.batch].base + part.first;
  const auto add = [&](int64_t batch, int64_t token, int64_t n) {
    runs.push_back({c.k + (batch * p.k.batch + token * p.k.token) * size,
                    c.v + (batch * p.v.batch + token * p.v.token) * size, n});
  };
  runs.clear();
  if (p.layout != CacheLayout::paged) return add(part.batch, slot, part.num_keys);
  for (int64_t left = part.num_keys; left > 0;) {
    const int64_t in_block = slot % p.block_size, n = std::min(left, p.block_size - in_block);
    add(c.at.blocks[part.batch * c.at.max_blocks + slot / p.block_size], in_block, n);
    slot += n, left -= n;
  }
}

// What a thread reuses from task to task.
struct Working {
  std::vector<DecodeRun> runs;
  std::vector<int64_t> begin, end;
  std::vector<float> scratch;
};

void run_part(const Call& c, const Part& part, float* partial, Working& w) {
  const DhaDecodeParams& p = c.p;
  const Component& m = c.components[part.component];
  find_runs(c, part, w.runs);
  w.begin.resize(m.rows), w.end.resize(m.rows);
  w.scratch.resize(decode_scratch(m.rows, p.head_dim));
  for (int64_t r = 0; r < m.rows; ++r) {
    const int64_t token = c.at.sequences[part.batch].length - p.num_queries + r % p.num_queries;
    w.begin[r] = p.window_left < 0 ? 0 : token - p.window_left - part.first;
    w.end[r] = token + 1 - part.first;
  }
  const DecodeTask task{
      .runs = w.runs.data(),
      .num_runs = static_cast<int64_t>(w.runs.size()),
      .num_keys = part.num_keys,
      .k_stride = p.k.token,
      .v_stride = p.v.token,
      .key_heads = m.key_heads.data(),
      .value_heads = m.value_heads.data(),
      .value_rows = m.value_rows.data(),
      .num_key_heads = static_cast<int64_t>(m.key_heads.size()),
      .num_value_heads = static_cast<int64_t>(m.value_heads.size()),
      .q = c.queries.data() + part.batch * c.queries_of_sequence + c.query_at[part.component],
      .begin = w.begin.data(),
      .end = w.end.data(),
      .rows = m.rows,
      .head_dim = p.head_dim,
      .value_dim = p.value_dim,
      .scale = p.scale,
      .softcap = p.softcap,
      .dtype = p.dtype,
      .max = partial,
      .sum = partial + m.rows,
      .out = partial + 2 * m.rows,
      .scratch = w.scratch.data()};
  TENFOLD_ISA_CALL(decode_task, task);
}

void combine_all(const Call& c, const float* partials, void* out, float* lse) {
  const DhaDecodeParams& p = c.p;
  const auto num_components = static_cast<int64_t>(c.components.size());
  std::vector<int64_t> out_rows;
  for (int64_t i = 0; i < p.batch * num_components; ++i) {
    const int64_t b = i / num_components;
    const Component& m = c.components[i % num_components];
    out_rows.clear();
    for (const int64_t h : m.q_heads)
      for (int64_t s = 0; s < p.num_queries; ++s)
        out_rows.push_back((b * p.q_heads + h) * p.num_queries + s);
    decode_combine({.partials = partials + c.partial_at[c.first_part[i]],
                    .num_tasks = c.first_part[i + 1] - c.first_part[i],
                    .rows = m.rows,
                    .value_dim = p.value_dim,
                    .out_rows = out_rows.data(),
                    .dtype = p.dtype,
                    .out = out,
                    .lse = lse});
  }
}

std::tuple<Tensor, Tensor> dha_decode_op(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kmap,
                                         Tensor vmap, Tensor kv_lens, OptTensor block_table,
                                         int64_t block_size, std::optional<double> scale,
                                         int64_t window_left, int64_t num_splits,
                                         OptTensor kv_start, OptTensor offsets, double softcap) {
  const DhaDecodeArgs args{block_table, block_size, scale,   window_left,
                           num_splits,  kv_start,   offsets, softcap};
  const Tensor k = with_readable_rows(k_cache), v = with_readable_rows(v_cache);
  Call c{};
  c.p = check_dha_decode(q, k, v, kmap, vmap, kv_lens, args);
  const DhaDecodeParams& p = c.p;
  c.k = static_cast<const char*>(k.data_ptr()), c.v = static_cast<const char*>(v.data_ptr());
  c.components = find_components(p, read_head_map(kOp, "kmap", kmap, p.k_heads, "key"),
                                 read_head_map(kOp, "vmap", vmap, p.v_heads, "value"));
  c.at = read_indices(p, kv_lens, args);
  make_parts(c);
  load_queries(c, q);
  const bool one = q.dim() == 3;
  const auto type = q.scalar_type();
  const Tensor out = one ? new_output(q, {p.batch, p.q_heads, p.value_dim}, type)
                         : new_output(q, {p.batch, p.q_heads, p.num_queries, p.value_dim}, type);
  const Tensor lse = one ? new_output(q, {p.batch, p.q_heads}, ScalarType::Float)
                         : new_output(q, {p.batch, p.q_heads, p.num_queries}, ScalarType::Float);
  const Scratch partials(c.partial_at.back() * static_cast<int64_t>(sizeof(float)));
  float* const results = static_cast<float*>(partials.data());
  const double micros = 40.0;  // about a megabyte
  parallel_for(static_cast<int64_t>(c.parts.size()), micros, [&](int64_t begin, int64_t end) {
    Working w;
    for (int64_t i = begin; i < end; ++i) run_part(c, c.parts[i], results + c.partial_at[i], w);
  });
  combine_all(c, results, out.data_ptr(), data_as<float>(lse));
  return {out, lse};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("dha_decode", TORCH_BOX(&tenfold::cpu::dha_decode_op));
}
