// SPDX-License-Identifier: Apache-2.0
// CPU registration of ragged_decode: segments -> chunks over threads -> combination in order.
#include "kv_eviction/ragged_decode.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/cpu/decode.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "kv_eviction/ops.h"

namespace tenfold::cpu {
namespace {

// Keys per task: enough to amortise a task, few enough that two threads share one long segment.
constexpr int64_t kChunkKeys = 512;

struct Segment {
  int64_t begin, length;
};

struct Chunk {
  int64_t segment, first_key, num_keys;
};

std::vector<Segment> read_segments(const Tensor& offsets, const OptTensor& lens, int64_t rows) {
  const auto at = read_ints<int64_t>(offsets);
  const auto given = lens ? read_ints<int64_t>(*lens) : std::vector<int64_t>();
  std::vector<Segment> segments;
  for (size_t i = 0; i + 1 < at.size(); ++i) {
    const int64_t n = lens ? given[i] : at[i + 1] - at[i];
    TENFOLD_CHECK_VALUE(at[i] >= 0 && at[i + 1] >= at[i] && at[i + 1] <= rows,
                        "tenfold::ragged_decode: offsets must ascend within [0, N = ", rows,
                        "], got ", at[i], " then ", at[i + 1], " at ", i);
    TENFOLD_CHECK_VALUE(n >= 0 && n <= at[i + 1] - at[i], "tenfold::ragged_decode: lens[", i,
                        "] must be in [0, ", at[i + 1] - at[i], "], got ", n);
    segments.push_back({at[i], n});
  }
  return segments;
}

// Everything one call needs, in element units.
struct Call {
  Tensor q, k, v;  // q [B, Hq, Sq, D]
  Dtype dtype;
  int64_t batch, q_heads, kv_heads, group, num_queries, head_dim, value_dim;
  float scale;
  int64_t rows() const { return group * num_queries; }
};

// All query rows in float: [segment][head in group * Sq + s][pitch]. Once per call: through the
// stable ABI even a tensor's address is a function call.
std::vector<float> load_queries(const Call& c, int64_t num_segments) {
  const int64_t pitch = decode_pitch(c.head_dim), size = dtype_size(c.dtype);
  std::vector<float> out(num_segments * c.rows() * pitch);
  const char* q = static_cast<const char*>(c.q.data_ptr());
  const int64_t sb = c.q.strides()[0], sh = c.q.strides()[1], ss = c.q.strides()[2],
                sd = c.q.strides()[3];
  float* to = out.data();
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const int64_t b = segment / c.kv_heads, first = segment % c.kv_heads * c.group;
    for (int64_t r = 0; r < c.rows(); ++r, to += pitch) {
      const int64_t at = b * sb + (first + r / c.num_queries) * sh + r % c.num_queries * ss;
      decode_load_query(q + at * size, c.dtype, sd, c.head_dim, to);
    }
  }
  return out;
}

// What a thread reuses from chunk to chunk; only the ends of the rows change.
struct Working {
  std::vector<int64_t> begin, end;
  std::vector<int32_t> value_rows;
  std::vector<float> scratch;
  Working(int64_t rows, int64_t head_dim)
      : begin(rows, 0), end(rows), value_rows(rows), scratch(decode_scratch(rows, head_dim)) {
    std::iota(value_rows.begin(), value_rows.end(), 0);
  }
};

void run_chunk(const Call& c, const Segment& s, const Chunk& chunk, const float* queries,
               float* partial, Working& w) {
  const int64_t rows = c.rows();
  for (int64_t r = 0; r < rows; ++r)
    w.end[r] = s.length - (c.num_queries - 1 - r % c.num_queries) - chunk.first_key;
  const int64_t size = dtype_size(c.dtype), row = s.begin + chunk.first_key;
  const auto at = [&](const Tensor& t) {
    return static_cast<const char*>(t.data_ptr()) + row * t.strides()[0] * size;
  };
  const DecodeRun run{at(c.k), at(c.v), chunk.num_keys};
  const DecodeHead head{0, 0, rows};
  const DecodeTask task{.runs = &run,
                        .num_runs = 1,
                        .num_keys = chunk.num_keys,
                        .k_stride = c.k.strides()[0],
                        .v_stride = c.v.strides()[0],
                        .key_heads = &head,
                        .value_heads = &head,
                        .value_rows = w.value_rows.data(),
                        .num_key_heads = 1,
                        .num_value_heads = 1,
                        .q = queries + chunk.segment * rows * decode_pitch(c.head_dim),
                        .begin = w.begin.data(),
                        .end = w.end.data(),
                        .rows = rows,
                        .head_dim = c.head_dim,
                        .value_dim = c.value_dim,
                        .scale = c.scale,
                        .softcap = 0.0f,
                        .dtype = c.dtype,
                        .max = partial,
                        .sum = partial + rows,
                        .out = partial + 2 * rows,
                        .scratch = w.scratch.data()};
  TENFOLD_ISA_CALL(decode_task, task);
}

std::tuple<Tensor, Tensor> ragged_decode_op(Tensor q, Tensor k, Tensor v, Tensor offsets,
                                            double scale, OptTensor lens) {
  check_ragged_decode(q, k, v, offsets, scale, lens);
  const bool one = q.dim() == 3;
  Call c{one ? torch::stable::unsqueeze(q, 2) : q,
         with_contiguous_rows(k),
         with_contiguous_rows(v),
         to_dtype(q.scalar_type()),
         q.sizes()[0],
         q.sizes()[1],
         0,
         0,
         one ? 1 : q.sizes()[2],
         k.sizes()[1],
         v.sizes()[1],
         static_cast<float>(scale)};
  const auto segments = read_segments(offsets, lens, k.sizes()[0]);
  c.kv_heads = c.batch > 0 ? static_cast<int64_t>(segments.size()) / c.batch : 0;
  c.group = c.kv_heads > 0 ? c.q_heads / c.kv_heads : 0;
  const auto type = q.scalar_type();
  const Tensor out = one ? new_output(q, {c.batch, c.q_heads, c.value_dim}, type)
                         : new_output(q, {c.batch, c.q_heads, c.num_queries, c.value_dim}, type);
  const Tensor lse = one ? new_output(q, {c.batch, c.q_heads}, ScalarType::Float)
                         : new_output(q, {c.batch, c.q_heads, c.num_queries}, ScalarType::Float);
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk{0};
  for (size_t i = 0; i < segments.size(); ++i) {
    for (int64_t at = 0; at < segments[i].length; at += kChunkKeys)
      chunks.push_back(
          {static_cast<int64_t>(i), at, std::min(kChunkKeys, segments[i].length - at)});
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
  }
  const auto num_chunks = static_cast<int64_t>(chunks.size());
  const int64_t partial_size = decode_partial(c.rows(), c.value_dim);
  std::vector<float> partials(num_chunks * partial_size);
  const double micros = static_cast<double>(kChunkKeys * c.rows() * c.head_dim) * 1e-4;
  const auto queries = load_queries(c, static_cast<int64_t>(segments.size()));
  parallel_for(num_chunks, micros, [&](int64_t begin, int64_t end) {
    Working w(c.rows(), c.head_dim);
    for (int64_t i = begin; i < end; ++i)
      run_chunk(c, segments[chunks[i].segment], chunks[i], queries.data(),
                partials.data() + i * partial_size, w);
  });
  std::vector<int64_t> out_rows(c.rows());  // [B, Hkv, group, Sq] is the order of out's rows
  for (size_t i = 0; i < segments.size(); ++i) {
    std::iota(out_rows.begin(), out_rows.end(), static_cast<int64_t>(i) * c.rows());
    decode_combine({.partials = partials.data() + first_chunk[i] * partial_size,
                    .num_tasks = first_chunk[i + 1] - first_chunk[i],
                    .rows = c.rows(),
                    .value_dim = c.value_dim,
                    .out_rows = out_rows.data(),
                    .dtype = c.dtype,
                    .out = out.data_ptr(),
                    .lse = data_as<float>(lse)});
  }
  return {out, lse};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("ragged_decode", TORCH_BOX(&tenfold::cpu::ragged_decode_op));
}
