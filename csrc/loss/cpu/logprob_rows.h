// SPDX-License-Identifier: Apache-2.0
// Rows of logits in chunks over threads: what selective_logprob and sequence_nll are made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "loss/selective_logprob.h"

namespace tenfold::cpu {

constexpr double kMicrosPerChunk = 2.0;

// [outer, inner, V] of any strides but the last.
struct LogitRows {
  const char* data;
  Dtype dtype;
  int64_t vocab, inner, outer_stride, stride;  // elements

  const char* at(int64_t row, int64_t column) const {
    return data + (row / inner * outer_stride + row % inner * stride + column) * dtype_size(dtype);
  }
  bool has(int64_t id) const { return id >= 0 && id < vocab; }
  float value(int64_t row, int64_t id) const {
    const char* const x = at(row, id);
    if (dtype == Dtype::f32) return *reinterpret_cast<const float*>(x);
    // One number by the vector code that reads all: its maximum.
    return static_cast<float>(TENFOLD_ISA_CALL(logit_sums, x, dtype, 1, 1.0f).max);
  }
  int64_t chunks() const { return (vocab + kLogitChunk - 1) / kLogitChunk; }
};

// max + log_sum is the log-sum-exp of a row.
struct LogitNorm {
  double max, log_sum, entropy;

  // As the sums saw the logit.
  double logp(float scaled) const { return static_cast<double>(scaled) - max - log_sum; }
};

inline LogitNorm norm_of(const LogitSums& s) {
  const double log_sum = s.sum > 0.0 || s.sum != s.sum ? std::log(s.sum) : 0.0;
  return {s.max, log_sum, log_sum - s.weighted / s.sum};
}

// Of rows row(0) .. row(count - 1). Chunks of a row are joined in order: no result depends on the
// number of threads.
template <class Row>
std::vector<LogitNorm> norms_of(const LogitRows& x, int64_t count, float scale, const Row& row) {
  const int64_t chunks = x.chunks();
  std::vector<LogitSums> parts(count * chunks);
  parallel_for(count * chunks, kMicrosPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % chunks * kLogitChunk;
      parts[i] = TENFOLD_ISA_CALL(logit_sums, x.at(row(i / chunks), column), x.dtype,
                                  std::min(kLogitChunk, x.vocab - column), scale);
    }
  });
  std::vector<LogitNorm> norms(count);
  for (int64_t r = 0; r < count; ++r) {
    LogitSums all = parts[r * chunks];
    for (int64_t i = 1; i < chunks; ++i) all = join(all, parts[r * chunks + i]);
    norms[r] = norm_of(all);
  }
  return norms;
}

// What a row's gradient is made of; lse is g.lse, and id only matters if g.of_id is not 0. Rows
// that do not count are zeros.
struct RowGrad {
  bool counts;
  LogitGrad g;
  int64_t id;
};

// out [rows, V] of the dtype, with grad(r) of every row.
template <class Grad>
void grads_of(const LogitRows& x, int64_t rows, float scale, void* out, const Grad& grad) {
  const int64_t chunks = x.chunks(), size = dtype_size(x.dtype);
  parallel_for(rows * chunks, kMicrosPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / chunks, column = i % chunks * kLogitChunk;
      const int64_t n = std::min(kLogitChunk, x.vocab - column);
      char* const to = static_cast<char*>(out) + (r * x.vocab + column) * size;
      const RowGrad row = grad(r);
      const LogitGrad& g = row.g;
      if (!row.counts) {
        std::memset(to, 0, n * size);
        continue;
      }
      TENFOLD_ISA_CALL(logit_grad, x.at(r, column), x.dtype, n, scale, g, to);
      if (g.of_id == 0.0f || row.id < column || row.id >= column + n) continue;
      // At the id, rounded once.
      const float log_p = x.value(r, row.id) * scale - g.lse, p = std::exp(log_p);
      const float d = p > 0.0f ? -(g.entropy + log_p) : 0.0f;
      const float y = (p * (g.of_p + g.of_entropy * d) + g.of_id) * scale;
      char* const at = to + (row.id - column) * size;
      if (x.dtype == Dtype::f32) {
        *reinterpret_cast<float*>(at) = y;
      } else {
        TENFOLD_ISA_CALL(round_one, y, x.dtype, at);
      }
    }
  });
}

}  // namespace tenfold::cpu
