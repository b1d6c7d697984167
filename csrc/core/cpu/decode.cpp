// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/decode.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace tenfold {
namespace {

constexpr double kLog2e = 1.4426950408889634;

float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float read_float(const void* p, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[at];
  const uint16_t bits = static_cast<const uint16_t*>(p)[at];
  if (dtype == Dtype::bf16) return bits_to_float(static_cast<uint32_t>(bits) << 16);
  return torch::headeronly::detail::fp16_ieee_to_fp32_value(bits);
}

void write_float(void* p, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(p)[at] = x;
  } else if (dtype == Dtype::bf16) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    static_cast<uint16_t*>(p)[at] = static_cast<uint16_t>(
        (nan ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  } else {
    static_cast<uint16_t*>(p)[at] = torch::headeronly::detail::fp16_ieee_from_fp32_value(x);
  }
}

}  // namespace

void decode_load_query(const void* q, Dtype dtype, int64_t stride, int64_t head_dim, float* to) {
  for (int64_t i = 0; i < head_dim; ++i) to[i] = read_float(q, dtype, i * stride);
  std::fill(to + head_dim, to + decode_pitch(head_dim), 0.0f);
}

void decode_combine(const DecodeResult& r) {
  const int64_t pitch = decode_pitch(r.value_dim), step = decode_partial(r.rows, r.value_dim);
  std::vector<float> sum_v(r.value_dim);
  for (int64_t row = 0; row < r.rows; ++row) {
    float top = kDecodeNothing, sum = 0.0f;
    for (int64_t i = 0; i < r.num_tasks; ++i) top = std::max(top, r.partials[i * step + row]);
    std::fill(sum_v.begin(), sum_v.end(), 0.0f);
    for (int64_t i = 0; i < r.num_tasks; ++i) {
      const float* p = r.partials + i * step;
      const float factor = std::exp2(p[row] - top);
      sum += p[r.rows + row] * factor;
      const float* v = p + 2 * r.rows + row * pitch;
      for (int64_t d = 0; d < r.value_dim; ++d) sum_v[d] += v[d] * factor;
    }
    const bool sees = top > kDecodeNothing || sum != 0.0f;  // NaN sums count as seen
    const int64_t at = r.out_rows[row];
    for (int64_t d = 0; d < r.value_dim; ++d)
      write_float(r.out, r.dtype, at * r.value_dim + d, sees ? sum_v[d] / sum : 0.0f);
    r.lse[at] =
        sees ? static_cast<float>(top / kLog2e + std::log(static_cast<double>(sum))) : -INFINITY;
  }
}

}  // namespace tenfold
