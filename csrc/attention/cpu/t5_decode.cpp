// SPDX-License-Identifier: Apache-2.0
#include "attention/cpu/t5_decode.h"

#include <algorithm>
#include <vector>

#include "attention/cpu/attention_task.h"
#include "core/cpu/decode.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kPartKeys = 2048;  // few enough that threads share one long sequence

struct Part {
  int64_t batch, head, first, num_keys;
};

void run_part(const AttentionForward& p, const Part& part, int64_t end, float* partial) {
  const int64_t size = dtype_size(p.dtype), pitch = decode_pitch(p.head_dim);
  const auto row = [&](const void* data, const RowLayout& at, int64_t i) {
    return static_cast<const char*>(data) +
           (part.batch * at.batch + part.head * at.head + i * at.row) * size;
  };
  const Scratch memory((pitch + decode_scratch(1, p.head_dim)) * 4);
  auto* const q = static_cast<float*>(memory.data());
  decode_load_query(row(p.q, p.q_at, 0), p.dtype, 1, p.head_dim, q);
  const DecodeRun run{row(p.k, p.k_at, part.first), row(p.v, p.v_at, part.first), part.num_keys};
  const DecodeHead one{0, 0, 1};
  const int32_t value_row = 0;
  const int64_t seen_from = 0, seen_to = end - part.first;
  const float* bias = nullptr;
  if (p.relative.data != nullptr)
    bias = p.relative.data + part.head * p.relative.head + p.relative.zero + part.first;
  const DecodeTask task{.runs = &run,
                        .num_runs = 1,
                        .num_keys = part.num_keys,
                        .k_stride = p.k_at.row,
                        .v_stride = p.v_at.row,
                        .key_heads = &one,
                        .value_heads = &one,
                        .value_rows = &value_row,
                        .num_key_heads = 1,
                        .num_value_heads = 1,
                        .q = q,
                        .begin = &seen_from,
                        .end = &seen_to,
                        .rows = 1,
                        .head_dim = p.head_dim,
                        .value_dim = p.value_dim,
                        .scale = p.scale,
                        .softcap = 0.0f,
                        .bias = bias,
                        .dtype = p.dtype,
                        .max = partial,
                        .sum = partial + 1,
                        .out = partial + 2,
                        .scratch = q + pitch};
  TENFOLD_ISA_CALL(decode_task, task);
}

}  // namespace

void run_t5_decode(const AttentionForward& p) {
  std::vector<Part> parts;
  std::vector<int64_t> first_part;  // [B H + 1]
  std::vector<int64_t> ends(p.batch);
  double micros = 0.0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t keys = attention_sequence(p, b).num_keys;
    ends[b] = visible_keys(p.mask, 0, 1, keys).last;
    for (int64_t h = 0; h < p.q_heads; ++h) {
      first_part.push_back(static_cast<int64_t>(parts.size()));
      for (int64_t j = 0; j < ends[b]; j += kPartKeys)
        parts.push_back({b, h, j, std::min(kPartKeys, ends[b] - j)});
    }
    micros += static_cast<double>(ends[b] * p.q_heads * (p.head_dim + p.value_dim)) * 1e-4;
  }
  first_part.push_back(static_cast<int64_t>(parts.size()));
  const int64_t each = decode_partial(1, p.value_dim), count = first_part.back();
  const Scratch memory(std::max<int64_t>(count, 1) * each * 4);
  auto* const partials = static_cast<float*>(memory.data());
  parallel_for(count, micros / static_cast<double>(std::max<int64_t>(count, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   run_part(p, parts[i], ends[parts[i].batch], partials + i * each);
               });
  for (int64_t row = 0; row < p.batch * p.q_heads; ++row)
    decode_combine({.partials = partials + first_part[row] * each,
                    .num_tasks = first_part[row + 1] - first_part[row],
                    .rows = 1,
                    .value_dim = p.value_dim,
                    .out_rows = &row,
                    .dtype = p.dtype,
                    .out = p.out,
                    .lse = p.lse});
}

}  // namespace tenfold::cpu
