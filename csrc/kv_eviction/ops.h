// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of the kv_eviction family share: argument checks (everything
// that can be told from shapes, dtypes and scalars), and the plain structs they produce.
// Checks of *values* in index tensors happen on CPU tensors only; CUDA kernels clamp instead of
// synchronising.
#pragma once

#include <optional>
#include <string_view>

#include "core/check.h"
#include "kv_eviction/nacl_select.h"
#include "kv_eviction/proxy_scores.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

struct ProxyScoresArgs {
  OptTensor lse;
  double scale;
  bool causal;
  int64_t q_offset;
  OptTensor q_positions;  // [W] or [B, W]
  OptTensor kv_start;     // [B]
  OptTensor kv_lens;      // [B]
  int64_t window;
  std::string_view reduce;
  OptTensor kmap;  // [Hq]
};

struct NaclSelectArgs {
  int64_t n_sink, n_recent, n_topk, n_random;
  double tau;
  std::string_view logits;
  int64_t seed, layer;
  OptTensor kv_start, kv_lens;  // [B]
  OptTensor row_id;             // [B]
  OptTensor counts;             // [B, 4] or [B, H, 4]
  int64_t pool_kernel;
  std::string_view pool;
  bool check_nan;
  int64_t width() const { return n_sink + n_recent + n_topk + n_random; }
};

ScoreReduce check_proxy_scores(const char* op, const Tensor& q, const Tensor& k,
                               const ProxyScoresArgs& a);

// Fills every field of the kernel's parameters that is not a pointer into a per-sequence buffer.
NaclSelectParams check_nacl_select(const char* op, const Tensor& scores, const NaclSelectArgs& a);

// k [B, HK, L, D], v [B, HV, L, DV], idx [B, HK = HV or 1, C].
void check_kv_gather(const char* op, const Tensor& k, const Tensor& v, const Tensor& idx,
                     const OptTensor& new_lens, const OptTensor& inv_freq,
                     const OptTensor& kv_start);

// Checks for writing into k and v in place: no overlapping elements, not the same memory.
void check_in_place(const char* op, const Tensor& k, const Tensor& v, const Tensor& idx);

void check_ragged_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                         double scale, const OptTensor& lens);

constexpr int64_t kMaxDecodeQueries = 16;

}  // namespace tenfold
