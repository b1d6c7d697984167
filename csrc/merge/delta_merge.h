// SPDX-License-Identifier: Apache-2.0
// Merges of task vectors d_e = expert_e - base, element by element, in one pass:
//
//   dare_merge  keep_e = not dropped (see dare.h)
//   ties_merge  keep_e = among the k_e = floor(density_e * n) largest |d_e|, equal ones by index,
//   the
//               lower first; NaN is largest
//
//   plain     out = base + sum_e c_e keep_e d_e
//   elected   v_e = c_e keep_e d_e;  P = sum of the positive v_e, N = sum of the negative ones
//             the sign with more mass wins: m = P if P + N >= 0, else N;
//             W = sum of share_e over the experts whose v_e has that sign
//             out = base + lambda * (normalize ? m / W : m)              (W = 0 counts as 1)
//
// Every step is float32 and rounded separately, but for c * d + sum and lambda * m + base, which
// are fused; experts are added in order, to -0. Thus results have the same bits on every device.
//   linear_merge, slerp_merge   out = sum_e c_e x_e, likewise.
//
// Layout: all tensors contiguous, of one dtype and shape; out may be one of the inputs.
// Traffic: every input read once, out written once. ties_merge reads its inputs once more to find
// the k-th largest magnitudes.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"
#include "merge/dare.h"

namespace tenfold {

enum class Pick : int { all, random, largest };

struct DeltaMerge {
  const void* base;
  void* out;
  Dtype dtype;
  int experts;
  Pick pick;
  bool elect, normalize;
  bool past_caches;  // out is written past them: it is large and none of the inputs
  float lambda;
  const void* expert[kMaxExperts];
  float weight[kMaxExperts];  // c
  float share[kMaxExperts];
  // random
  DropKey key;
  int64_t offset;  // of the first element in the whole tensor
  DropLimit drop[kMaxExperts];
  uint32_t number[kMaxExperts];  // of the expert in the caller's list
  // largest: keys of magnitudes, see magnitude_keys
  uint32_t cut[kMaxExperts];
};

struct WeightedSum {
  void* out;
  Dtype dtype;
  int terms;
  bool past_caches;
  const void* term[kMaxExperts];
  float weight[kMaxExperts];
};

// Elements [begin, end). ties: for each expert, how many elements equal to its cut are still kept.
TENFOLD_ISA_DECLARE_BF16(void delta_merge(const DeltaMerge& m, int64_t begin, int64_t end,
                                          int64_t* ties))
TENFOLD_ISA_DECLARE_BF16(void weighted_sum(const WeightedSum& m, int64_t begin, int64_t end))

// Keys in the order of |expert - base|: its float bits + 1; NaN is largest. `keys` has room for a
// multiple of the vector width.
TENFOLD_ISA_DECLARE_BF16(void magnitude_keys(const void* base, const void* expert, Dtype dtype,
                                             int64_t begin, int64_t n, uint32_t* keys))
TENFOLD_ISA_DECLARE_BF16(void magnitude_sample(const void* base, const void* expert, Dtype dtype,
                                               const int64_t* at, int64_t n, uint32_t* keys))

// all[e] and kept[e]: sums of |d_e| (or, squared, of d_e^2) over the elements [begin, end) and over
// those that are not dropped, in float64.
TENFOLD_ISA_DECLARE_BF16(void delta_norms(const DeltaMerge& m, int64_t begin, int64_t end,
                                          bool squared, double* all, double* kept))

}  // namespace tenfold
