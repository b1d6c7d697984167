// CPU registration of ragged_decode: segments -> chunks over threads -> combination in order.
#include "kv_eviction/ragged_decode.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "kv_eviction/ops.h"

namespace tenfold::cpu {
namespace {

// Keys per task: enough to amortise a task, few enough that two threads share one long segment.
constexpr int64_t kChunkKeys = 512;
constexpr double kLog2e = 1.4426950408889634;

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
  float q_scale;
  int64_t rows() const { return group * num_queries; }
};

template <class T>
float read_float(T x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, bf16_t>)
    return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
  if constexpr (std::is_same_v<T, fp16_t>)
    return static_cast<float>(torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits));
}

template <class T>
void fill_queries(const Call& c, int64_t num_segments, float* out) {
  const T* q = data_as<T>(c.q);
  const int64_t sb = c.q.strides()[0], sh = c.q.strides()[1], ss = c.q.strides()[2],
                sd = c.q.strides()[3], pitch = decode_pitch(c.head_dim);
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const int64_t b = segment / c.kv_heads, first = segment % c.kv_heads * c.group;
    for (int64_t r = 0; r < c.rows(); ++r, out += pitch) {
      const T* row = q + b * sb + (first + r / c.num_queries) * sh + r % c.num_queries * ss;
      for (int64_t i = 0; i < c.head_dim; ++i) out[i] = read_float(row[i * sd]) * c.q_scale;
      std::fill(out + c.head_dim, out + pitch, 0.0f);
    }
  }
}

// All query rows, scaled, in float: [segment][head in group * Sq + s][pitch]. Once per call:
// through the stable ABI even a tensor's address is a function call.
std::vector<float> load_queries(const Call& c, int64_t num_segments) {
  std::vector<float> out(num_segments * c.rows() * decode_pitch(c.head_dim));
  if (c.dtype == Dtype::f32) fill_queries<float>(c, num_segments, out.data());
  if (c.dtype == Dtype::bf16) fill_queries<bf16_t>(c, num_segments, out.data());
  if (c.dtype == Dtype::f16) fill_queries<fp16_t>(c, num_segments, out.data());
  return out;
}

// Result of one chunk: max [rows], sum [rows], out [rows][pitch].
int64_t partial_size(const Call& c) {
  return c.rows() * (2 + decode_pitch(c.value_dim));
}

void run_chunk(const Call& c, const Segment& s, const Chunk& chunk, const float* queries,
               float* partial, std::vector<float>& scratch) {
  const int64_t rows = c.rows();
  scratch.resize(rows * kDecodeKeyBlock);
  std::vector<int64_t> visible(rows);
  for (int64_t r = 0; r < rows; ++r)
    visible[r] = s.length - (c.num_queries - 1 - r % c.num_queries) - chunk.first_key;
  const int64_t size = dtype_size(c.dtype), row = s.begin + chunk.first_key;
  const auto at = [&](const Tensor& t) {
    return static_cast<const char*>(t.data_ptr()) + row * t.strides()[0] * size;
  };
  const DecodeChunk d{.k = at(c.k),
                      .v = at(c.v),
                      .k_stride = c.k.strides()[0],
                      .v_stride = c.v.strides()[0],
                      .num_keys = chunk.num_keys,
                      .q = queries + chunk.segment * rows * decode_pitch(c.head_dim),
                      .visible = visible.data(),
                      .rows = rows,
                      .head_dim = c.head_dim,
                      .value_dim = c.value_dim,
                      .dtype = c.dtype,
                      .max = partial,
                      .sum = partial + rows,
                      .out = partial + 2 * rows,
                      .scratch = scratch.data()};
  TENFOLD_ISA_CALL(decode_chunk, d);
}

void write_out(char* out, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::f32) {
    reinterpret_cast<float*>(out)[at] = x;
  } else if (dtype == Dtype::bf16) {
    const uint32_t bits = float_to_bits(x);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    reinterpret_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(
        (nan ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  } else {
    reinterpret_cast<uint16_t*>(out)[at] = torch::headeronly::detail::fp16_ieee_from_fp32_value(x);
  }
}

// Combines the chunks [first, last) of one segment into its output rows (contiguous out and lse).
void combine(const Call& c, int64_t segment, const float* first, int64_t num_chunks, char* out,
             float* lse) {
  const int64_t rows = c.rows(), pitch = decode_pitch(c.value_dim), step = partial_size(c);
  const int64_t row0 = segment * rows;  // [B, Hkv, group, Sq] is the order of out's rows
  std::vector<float> sum_v(c.value_dim);
  for (int64_t r = 0; r < rows; ++r) {
    float top = -1e30f, sum = 0.0f;
    for (int64_t i = 0; i < num_chunks; ++i) top = std::max(top, first[i * step + r]);
    std::fill(sum_v.begin(), sum_v.end(), 0.0f);
    for (int64_t i = 0; i < num_chunks; ++i) {
      const float* p = first + i * step;
      const float factor = std::exp2(p[r] - top);
      sum += p[rows + r] * factor;
      for (int64_t d = 0; d < c.value_dim; ++d) sum_v[d] += p[2 * rows + r * pitch + d] * factor;
    }
    const bool sees = top > -1e30f || sum != 0.0f;  // NaN sums count as seen
    for (int64_t d = 0; d < c.value_dim; ++d)
      write_out(out, c.dtype, (row0 + r) * c.value_dim + d, sees ? sum_v[d] / sum : 0.0f);
    lse[row0 + r] =
        sees ? static_cast<float>(top / kLog2e + std::log(static_cast<double>(sum))) : -INFINITY;
  }
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
         static_cast<float>(scale * kLog2e)};
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
  std::vector<float> partials(num_chunks * partial_size(c));
  const double micros = static_cast<double>(kChunkKeys * c.rows() * c.head_dim) * 1e-4;
  const auto queries = load_queries(c, static_cast<int64_t>(segments.size()));
  parallel_for(num_chunks, micros, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; ++i)
      run_chunk(c, segments[chunks[i].segment], chunks[i], queries.data(),
                partials.data() + i * partial_size(c), scratch);
  });
  char* out_data = static_cast<char*>(out.data_ptr());
  float* lse_data = data_as<float>(lse);
  for (size_t i = 0; i < segments.size(); ++i)
    combine(c, static_cast<int64_t>(i), partials.data() + first_chunk[i] * partial_size(c),
            first_chunk[i + 1] - first_chunk[i], out_data, lse_data);
  return {out, lse};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("ragged_decode", TORCH_BOX(&tenfold::cpu::ragged_decode_op));
}
