// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of t5_attention and its backward share.
#pragma once

#include "attention/prefill_ops.h"
#include "attention/t5_attention.h"

namespace tenfold {

struct T5Args {
  bool bidirectional, causal;
  int64_t max_distance, q_offset;
  double dropout_p;
  int64_t seed, offset;
  double scale;
};

// All that can be told without reading memory of a device.
void check_t5_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptTensor& bias_table, const OptTensor& kv_len, const T5Args& a);

// Sizes, strides, mask, dropout and scalars of checked arguments. Left to the caller: the bias,
// kv_len, and the maps, which are the identity.
AttentionParams t5_params(const Tensor& q, const Tensor& k, const Tensor& v, const T5Args& a);

inline RelativeBuckets t5_buckets(const Tensor& bias_table, const T5Args& a) {
  return relative_buckets(bias_table.sizes()[0], a.bidirectional, a.max_distance);
}

// Gradient of the table, in float32 until it is whole; [0, H] where there is no table.
Tensor new_t5_table(const Tensor& q, const OptTensor& bias_table);

}  // namespace tenfold
