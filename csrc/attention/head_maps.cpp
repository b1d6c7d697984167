// SPDX-License-Identifier: Apache-2.0
#include "attention/head_maps.h"

#include <cmath>

namespace tenfold {

void check_head_map(const char* op, const char* arg, const Tensor& map, const Tensor& q) {
  check_int_dtype(op, arg, map);
  check_same_device(op, "q", q, arg, map);
  check_sizes(op, arg, map, {q.sizes()[1]}, "[H] (one entry per query head)");
}

std::vector<int64_t> read_head_map(const char* op, const char* arg, const Tensor& map,
                                   int64_t heads, const char* what) {
  auto entries = read_ints<int64_t>(map);
  for (size_t h = 0; h < entries.size(); ++h)
    TENFOLD_CHECK_VALUE(entries[h] >= 0 && entries[h] < heads, "tenfold::", op, ": ", arg, "[", h,
                        "] must be a ", what, " head in [0, ", heads, "), got ", entries[h]);
  return entries;
}

void check_logit_options(const char* op, const std::optional<double>& scale, double softcap,
                         int64_t window_left) {
  TENFOLD_CHECK_VALUE(!scale || std::isfinite(*scale), "tenfold::", op,
                      ": scale must be finite, got ", scale.value_or(0.0));
  TENFOLD_CHECK_VALUE(std::isfinite(softcap) && softcap >= 0.0, "tenfold::", op,
                      ": softcap must be 0 (none) or a positive finite number, got ", softcap);
  TENFOLD_CHECK_VALUE(window_left >= -1, "tenfold::", op,
                      ": window_left must be -1 (none) or a number of keys >= 0, got ",
                      window_left);
}

}  // namespace tenfold
