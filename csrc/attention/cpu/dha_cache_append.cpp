// SPDX-License-Identifier: Apache-2.0
// CPU registration of dha_cache_append_: slots are checked, then rows are written over threads.
#include "attention/dha_cache_append.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "attention/decode_ops.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

constexpr auto kOp = "dha_cache_append_";

struct Source {
  const char* data;
  int64_t batch, head, token;  // bytes
};

Source source_of(const Tensor& t, int64_t batch, int64_t head, int64_t token, Dtype dtype) {
  const int64_t size = dtype_size(dtype);
  return {static_cast<const char*>(t.data_ptr()), batch * size, head * size, token * size};
}

std::vector<int64_t> read_slots(const DhaAppendParams& p, const Tensor& slots) {
  auto values = read_ints<int64_t>(slots);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    TENFOLD_CHECK_INDEX(values[i] >= -1 && values[i] < p.num_slots, "tenfold::", kOp, ": slots[",
                        at / p.num_tokens, "][", at % p.num_tokens,
                        "] must be -1 (skip) or in [0, ", p.num_slots, "), got ", values[i]);
  }
  return values;
}

// Elements before the row of a slot and head.
int64_t row_of(const DhaAppendParams& p, const CacheStrides& at, int64_t b, int64_t slot,
               int64_t head) {
  if (p.layout == CacheLayout::paged)
    return slot / p.block_size * at.batch + slot % p.block_size * at.token + head * at.head;
  return b * at.batch + slot * at.token + head * at.head;
}

struct Call {
  DhaAppendParams p;
  std::vector<int64_t> slots;
  Source k, v, cos, sin;
  char *k_cache, *v_cache;
};

void write_token(const Call& c, int64_t b, int64_t s) {
  const DhaAppendParams& p = c.p;
  const int64_t slot = c.slots[b * p.num_tokens + s], size = dtype_size(p.dtype);
  if (slot < 0) return;
  for (int64_t h = 0; h < p.k_heads; ++h) {
    const char* from = c.k.data + b * c.k.batch + h * c.k.head + s * c.k.token;
    char* to = c.k_cache + row_of(p, p.k_cache, b, slot, h) * size;
    if (p.rotate) {
      const RotateRow row{from,
                          c.cos.data + b * c.cos.batch + s * c.cos.token,
                          c.sin.data + b * c.sin.batch + s * c.sin.token,
                          to,
                          p.head_dim,
                          p.dtype,
                          p.angle_dtype};
      TENFOLD_ISA_CALL(rotate_row, row);
    } else {
      std::memcpy(to, from, p.head_dim * size);
    }
  }
  for (int64_t h = 0; h < p.v_heads; ++h)
    std::memcpy(c.v_cache + row_of(p, p.v_cache, b, slot, h) * size,
                c.v.data + b * c.v.batch + h * c.v.head + s * c.v.token, p.value_dim * size);
}

void dha_cache_append_op(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor slots,
                         bool paged, OptTensor cos, OptTensor sin) {
  k = with_readable_rows(k), v = with_readable_rows(v);
  if (cos) cos = with_readable_rows(*cos);
  if (sin) sin = with_readable_rows(*sin);
  Call c{};
  c.p = check_dha_append(k_cache, v_cache, k, v, slots, {paged, cos, sin});
  const DhaAppendParams& p = c.p;
  c.slots = read_slots(p, slots);
  c.k = source_of(k, p.k_batch, p.k_head, p.k_token, p.dtype);
  c.v = source_of(v, p.v_batch, p.v_head, p.v_token, p.dtype);
  if (p.rotate) {
    c.cos = source_of(*cos, p.cos_batch, 0, p.cos_token, p.angle_dtype);
    c.sin = source_of(*sin, p.sin_batch, 0, p.sin_token, p.angle_dtype);
  }
  c.k_cache = static_cast<char*>(k_cache.data_ptr());
  c.v_cache = static_cast<char*>(v_cache.data_ptr());
  const int64_t bytes = (p.k_heads * p.head_dim + p.v_heads * p.value_dim) * dtype_size(p.dtype);
  parallel_for(p.batch * p.num_tokens, 2e-4 * static_cast<double>(bytes),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   write_token(c, i / p.num_tokens, i % p.num_tokens);
               });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("dha_cache_append_", TORCH_BOX(&tenfold::cpu::dha_cache_append_op));
}
