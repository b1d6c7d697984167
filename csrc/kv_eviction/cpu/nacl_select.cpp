// SPDX-License-Identifier: Apache-2.0
// CPU nacl_select: per (sequence, head) the top-k and the draws are marked, then one ordered pass
// writes what is marked.
#include "kv_eviction/nacl_select.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "kv_eviction/cpu/impl.h"

namespace tenfold::cpu {
namespace {

struct RowArgs {
  const float* scores;  // [L], contiguous
  int64_t begin, end;   // valid slots
  NaclCounts counts;
  uint32_t head, row_id;
  int64_t* idx;  // [C]
};

// Working memory of a thread.
struct Buffers {
  Buffers(void* data, int64_t length)
      : row{static_cast<uint32_t*>(data), row.at + length + kNaclSlack,
            row.keys + length + kNaclSlack,
            reinterpret_cast<uint8_t*>(row.boundary + length + kNaclSlack)},
        pooled(reinterpret_cast<float*>(row.chosen + (length + 2 * kNaclSlack) / 16 * 16)) {}
  static int64_t bytes(int64_t length) { return 17 * length + (4 * 4 + 2) * kNaclSlack; }
  NaclBuffers row;
  float* pooled;  // [length]
};

int64_t select_row(const NaclSelectParams& p, const RowArgs& a, const Buffers& buf) {
  const int64_t n = a.end - a.begin;
  const int64_t total = int64_t{a.counts.sink} + a.counts.recent + a.counts.topk + a.counts.random;
  int64_t* out = a.idx;
  if (n <= total) {
    for (int64_t j = a.begin; j < a.end; ++j) *out++ = j;
    return n;
  }
  const int64_t first = a.begin + a.counts.sink, m = n - a.counts.sink - a.counts.recent;
  const float* scores = a.scores + first;
  if (p.pool_kernel > 1) {
    TENFOLD_ISA_CALL(nacl_pool, scores, m, p.pool_kernel, p.pool_max, buf.pooled);
    scores = buf.pooled;
  }
  const float top = TENFOLD_ISA_CALL(nacl_choose_topk, scores, m, a.counts.topk, buf.row);
  if (a.counts.random > 0) {
    const NaclDraw draw{a.counts.random, m - a.counts.topk,
                        a.head,          static_cast<uint32_t>(a.counts.sink),
                        a.row_id,        top};
    TENFOLD_ISA_CALL(nacl_choose_draws, p, draw, scores, m, buf.row);
  }
  for (int64_t j = a.begin; j < first; ++j) *out++ = j;
  out += TENFOLD_ISA_CALL(nacl_emit, m, first, buf.row, out);
  for (int64_t j = a.end - a.counts.recent; j < a.end; ++j) *out++ = j;
  return total;
}

// Counts of every (sequence, head), checked against the width.
std::vector<NaclCounts> read_counts(const char* op, const NaclSelectParams& p,
                                    const NaclSelectArgs& a) {
  std::vector<NaclCounts> all(p.batch * p.heads, p.counts);
  if (!a.counts) return all;
  const auto given = read_ints<int64_t>(*a.counts);
  for (int64_t row = 0; row < p.batch * p.heads; ++row) {
    const int64_t* c = given.data() + (p.counts_per_head ? row : row / p.heads) * 4;
    int64_t sum = 0;
    for (int i = 0; i < 4; ++i) {
      TENFOLD_CHECK_VALUE(c[i] >= 0 && c[i] <= p.width, "tenfold::", op,
                          ": counts must be in [0, C = ", p.width,
                          "] (C = n_sink + n_recent + n_topk + n_random), got ", c[i]);
      sum += c[i];
    }
    TENFOLD_CHECK_VALUE(sum <= p.width, "tenfold::", op,
                        ": each row of counts must sum to at most "
                        "C = n_sink + n_recent + n_topk + n_random = ",
                        p.width, ", got ", sum);
    all[row] = {static_cast<int32_t>(c[0]), static_cast<int32_t>(c[1]), static_cast<int32_t>(c[2]),
                static_cast<int32_t>(c[3])};
  }
  return all;
}

void check_no_nan(const char* op, const Tensor& scores) {
  const float* data = data_as<float>(scores);
  for (int64_t i = 0; i < scores.numel(); ++i)
    TENFOLD_CHECK_VALUE(!std::isnan(data[i]), "tenfold::", op,
                        ": scores contain NaN (check_nan=True), first at flat index ", i);
}

}  // namespace

std::tuple<Tensor, Tensor> nacl_select(const char* op, const Tensor& scores_in,
                                       const NaclSelectArgs& a) {
  const NaclSelectParams p = check_nacl_select(op, scores_in, a);
  const auto range = read_kv_range(op, a.kv_start, a.kv_lens, p.batch, p.length);
  const auto counts = read_counts(op, p, a);
  const auto row_ids = a.row_id ? read_ints<int64_t>(*a.row_id) : std::vector<int64_t>(p.batch, 0);
  const Tensor scores = torch::stable::contiguous(scores_in);
  if (a.check_nan) check_no_nan(op, scores);
  const Tensor idx = new_output(scores, {p.batch, p.heads, p.width}, ScalarType::Long);
  const Tensor new_lens = p.counts_per_head
                              ? new_output(scores, {p.batch, p.heads}, ScalarType::Int)
                              : new_output(scores, {p.batch}, ScalarType::Int);
  auto* lens = data_as<int32_t>(new_lens);
  if (p.heads == 0) std::fill(lens, lens + new_lens.numel(), 0);
  const double micros = 0.5 + static_cast<double>(p.length) * 2e-3;
  parallel_for(p.batch * p.heads, micros, [&](int64_t begin, int64_t end) {
    const Scratch scratch(Buffers::bytes(p.length));
    const Buffers buffers(scratch.data(), p.length);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.heads, h = row % p.heads;
      int64_t* out = data_as<int64_t>(idx) + row * p.width;
      const RowArgs args{data_as<float>(scores) + row * p.length,
                         range.begin[b],
                         range.end[b],
                         counts[row],
                         static_cast<uint32_t>(h),
                         static_cast<uint32_t>(row_ids[b]),
                         out};
      const int64_t n = select_row(p, args, buffers);
      std::fill(out + n, out + p.width, int64_t{-1});
      if (p.counts_per_head || h == 0) lens[p.counts_per_head ? row : b] = static_cast<int32_t>(n);
    }
  });
  return {idx, new_lens};
}

namespace {

std::tuple<Tensor, Tensor> nacl_select_op(Tensor scores, int64_t n_sink, int64_t n_recent,
                                          int64_t n_topk, int64_t n_random, double tau,
                                          std::string_view logits, int64_t seed, int64_t layer,
                                          OptTensor kv_start, OptTensor kv_lens, OptTensor row_id,
                                          OptTensor counts, int64_t pool_kernel,
                                          std::string_view pool, bool check_nan) {
  return nacl_select("nacl_select", scores,
                     {n_sink, n_recent, n_topk, n_random, tau, logits, seed, layer, kv_start,
                      kv_lens, row_id, counts, pool_kernel, pool, check_nan});
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("nacl_select", TORCH_BOX(&tenfold::cpu::nacl_select_op));
}
