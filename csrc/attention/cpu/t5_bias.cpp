// SPDX-License-Identifier: Apache-2.0
#include "attention/cpu/t5_bias.h"

#include <algorithm>
#include <memory>

#include "core/cpu/decode.h"
#include "core/dispatch.h"

namespace tenfold::cpu {
namespace {

// Kernels read past the ends: rows and keys up to whole tiles and blocks.
constexpr int64_t kMargin = 256;

}  // namespace

DistanceTable::DistanceTable(const Tensor& bias_table, const T5Args& a, int64_t num_queries,
                             int64_t num_keys, Along along)
    : heads_(bias_table.sizes()[1]), num_buckets_(bias_table.sizes()[0]) {
  // i - j lies in (-num_keys, num_queries).
  pitch_ = num_queries + num_keys + 2 * kMargin;
  step_ = along == Along::queries ? 1 : -1;
  zero_ = kMargin + (along == Along::queries ? num_keys : num_queries);
  const RelativeBuckets buckets = t5_buckets(bias_table, a);
  const int64_t reach = bucket_reach(buckets);
  buckets_.resize(pitch_);
  const auto far_behind = static_cast<int16_t>(bucket_of(buckets, -reach));
  const auto far_ahead = static_cast<int16_t>(bucket_of(buckets, reach));
  for (int64_t at = 0; at < pitch_; ++at) {
    const int64_t r = (zero_ - at) * step_ - a.q_offset;
    buckets_[at] = r <= -reach  ? far_behind
                   : r >= reach ? far_ahead
                                : static_cast<int16_t>(bucket_of(buckets, r));
  }
  biases_ = std::make_unique<Scratch>(floats() * 4);
  auto* to = static_cast<float*>(biases_->data());
  const Dtype dtype = to_dtype(bias_table.scalar_type());
  const auto* table = static_cast<const char*>(bias_table.data_ptr());
  float column[kMostBuckets + 16];
  for (int64_t h = 0; h < heads_; ++h) {
    decode_load_query(table + h * bias_table.strides()[1] * dtype_size(dtype), dtype,
                      bias_table.strides()[0], num_buckets_, column);
    for (const int16_t bucket : buckets_) *to++ = column[bucket];
  }
}

RelativeBias DistanceTable::params() const {
  return {static_cast<const float*>(biases_->data()), pitch_, zero_, step_};
}

void DistanceTable::sum_buckets(const float* distances, float* dtable) const {
  std::vector<double> sums(num_buckets_);
  for (int64_t h = 0; h < heads_; ++h) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t at = 0; at < pitch_; ++at) sums[buckets_[at]] += distances[h * pitch_ + at];
    for (int64_t b = 0; b < num_buckets_; ++b) dtable[b * heads_ + h] = static_cast<float>(sums[b]);
  }
}

}  // namespace tenfold::cpu
