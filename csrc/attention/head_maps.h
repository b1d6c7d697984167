// SPDX-License-Identifier: Apache-2.0
// Checks that prefill and decode share: maps from query heads to key or value heads, and the scalar
// options of logits.
#pragma once

#include <optional>
#include <vector>

#include "core/tensor.h"

namespace tenfold {

// Dtype, device and length of a map [H] for q [B, H, ...] or [T, H, D].
void check_head_map(const char* op, const char* arg, const Tensor& map, const Tensor& q);

// The entries of a CPU map, each checked against the number of heads; `what`: "key" or "value".
std::vector<int64_t> read_head_map(const char* op, const char* arg, const Tensor& map,
                                   int64_t heads, const char* what);

void check_logit_options(const char* op, const std::optional<double>& scale, double softcap,
                         int64_t window_left);

}  // namespace tenfold
