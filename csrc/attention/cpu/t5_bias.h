// SPDX-License-Identifier: Apache-2.0
// The relative bias of a call on the CPU: a float per head and distance i - j of its queries and
// keys, so that the kernels read biases as they read rows. Linear in the lengths.
#pragma once

#include <memory>
#include <vector>

#include "attention/t5_ops.h"
#include "core/scratch.h"

namespace tenfold::cpu {

class DistanceTable {
 public:
  // What lies in order: biases of neighbouring queries, or of neighbouring keys.
  enum class Along { queries, keys };

  DistanceTable(const Tensor& bias_table, const T5Args& a, int64_t num_queries, int64_t num_keys,
                Along along);

  RelativeBias params() const;  // into this object
  int64_t floats() const { return heads_ * pitch_; }

  // Sums over distances, laid out as the biases, summed up by bucket -> dtable [num_buckets, H].
  void sum_buckets(const float* distances, float* dtable) const;

 private:
  int64_t heads_, zero_, pitch_, step_;
  std::vector<int16_t> buckets_;  // [pitch]
  int64_t num_buckets_;
  std::unique_ptr<Scratch> biases_;  // [H][pitch]
};

}  // namespace tenfold::cpu
