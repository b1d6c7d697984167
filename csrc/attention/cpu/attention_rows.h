// SPDX-License-Identifier: Apache-2.0
// Row tiles of the CPU attention kernels: which query rows the lanes hold, what they see, and the
// changes of their logits that are not a product (soft cap, bias, mask). For ISA sources.
#pragma once

#include "attention/cpu/attention_task.h"
#include "core/cpu/panels.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kBlockKeys = 128;              // keys of a block of packed panels, at most
constexpr float kLowest = -3.402823466e38f;  // maximum of a row that has seen nothing
inline VF minus_infinity() {
  return from_bits(seti(0xFF800000u));
}

// The query rows of one tile, lane by lane. Lanes without a row see everything, so that they ask
// for no mask; nothing of theirs is stored.
struct Rows {
  int count, vecs;
  int32_t head[kTileRows];
  int64_t row[kTileRows];                                  // within its sequence
  alignas(64) uint32_t first[kTileRows], last[kTileRows];  // keys that it sees: [first, last)
  KeyRange any, all;                                       // seen by some row; by every row
  int64_t vec_last[kVecs];                                 // end of what a vector of rows sees
};

inline Rows tile_rows(const AttentionParams& p, const AttentionTask& t, int64_t tile) {
  const AttentionSequence s = attention_sequence(p, t.sequence);
  const int64_t together = attention_heads_per_tile(s.num_queries, kTileRows);
  const AttentionGroup& g = t.group;
  Rows r{};
  r.any = {s.num_keys, 0}, r.all = {0, s.num_keys};
  for (int i = 0; i < kTileRows; ++i) {
    const int64_t head = together > 1 ? tile * together + i / s.num_queries : tile % g.num_heads;
    const int64_t row = together > 1 ? i % s.num_queries : tile / g.num_heads * kTileRows + i;
    const bool real = head < g.num_heads && row < s.num_queries &&
                      (together == 1 || i < together * s.num_queries);
    r.first[i] = 0, r.last[i] = static_cast<uint32_t>(s.num_keys);
    if (!real) continue;
    const KeyRange k = visible_keys(p.mask, row, s.num_queries, s.num_keys);
    const int64_t first = k.first < k.last ? k.first : 0, last = k.first < k.last ? k.last : 0;
    r.count = i + 1;
    r.head[i] = g.heads[head];
    r.row[i] = row;
    r.first[i] = static_cast<uint32_t>(first), r.last[i] = static_cast<uint32_t>(last);
    if (last > r.vec_last[i / kWidth]) r.vec_last[i / kWidth] = last;
    if (first < last && first < r.any.first) r.any.first = first;
    if (first < last && last > r.any.last) r.any.last = last;
    r.all.first = first > r.all.first ? first : r.all.first;
    r.all.last = last < r.all.last ? last : r.all.last;
  }
  r.vecs = (r.count + kWidth - 1) / kWidth;
  return r;
}

template <class T>
inline T* row_at(const void* base, const RowLayout& at, int64_t sequence, int64_t first,
                 int64_t head, int64_t row) {
  return const_cast<T*>(static_cast<const T*>(base)) + sequence * at.batch + head * at.head +
         (first + row) * at.row;
}

inline void cap_logits(float cap, int64_t words, float* s) {
  const VF scale = set1(1.0f / cap), top = set1(cap);
  for (int64_t i = 0; i < words; i += kWidth) store(s + i, tanh(load(s + i) * scale) * top);
}

inline float bias_value(const AttentionBias& b, int64_t at) {
  float lanes[kWidth];
  switch (b.kind) {
    case BiasKind::boolean:
      return static_cast<const uint8_t*>(b.data)[at] != 0 ? 0.0f : -__builtin_inff();
    case BiasKind::f32: return static_cast<const float*>(b.data)[at];
    case BiasKind::bf16: store(lanes, load_n(static_cast<const bf16_t*>(b.data) + at, 1)); break;
    default: store(lanes, load_n(static_cast<const fp16_t*>(b.data) + at, 1)); break;
  }
  return lanes[0];
}

// n values of one row from `at` on as floats; a hidden key has -inf.
inline void bias_row(const AttentionBias& b, int64_t at, int64_t n, float* to) {
  if (b.key == 1 && b.kind == BiasKind::f32)
    return row_to_float(static_cast<const float*>(b.data) + at, n, to);
  if (b.key == 1 && b.kind == BiasKind::bf16)
    return row_to_float(static_cast<const bf16_t*>(b.data) + at, n, to);
  if (b.key == 1 && b.kind == BiasKind::f16)
    return row_to_float(static_cast<const fp16_t*>(b.data) + at, n, to);
  for (int64_t j = 0; j < n; ++j) to[j] = bias_value(b, at + j * b.key);
}

// A bias of -inf hides the key whatever its logit is.
inline void add_bias(float* s, VF bias) {
  const VF x = load(s);
  store(s, select(eq(bias, minus_infinity()), minus_infinity(), x + bias));
}

// Adds the bias of keys [key, key + n) to the logits s [n][kTileRows]. `staged`: 8 rows of
// kBlockKeys.
inline void add_bias_block(const AttentionBias& b, const Rows& r, int64_t sequence, int64_t key,
                           int64_t n, float* staged, float* s) {
  const auto at = [&](int i) {
    return sequence * b.batch + r.head[i] * b.head + r.row[i] * b.row + key * b.key;
  };
  if (b.head == 0 && b.row == 0) {  // a mask of padding: one row for all
    bias_row(b, at(0), n, staged);
    for (int64_t j = 0; j < n; ++j)
      for (int v = 0; v < r.vecs; ++v) add_bias(s + j * kTileRows + v * kWidth, set1(staged[j]));
    return;
  }
  alignas(64) float turned[8][kTileRows];
  for (int64_t j = 0; j < n; j += 8) {
    const int64_t keys = n - j < 8 ? n - j : 8;
    for (int i = 0; i < kTileRows; i += 8) {
      float spare[8][8] = {}, to[8][8];
      for (int k = 0; k < 8 && i + k < r.count; ++k)
        bias_row(b, at(i + k) + j * b.key, keys, spare[k]);
      transpose8(spare[0], 8, to[0], 8);
      const int rows = kTileRows - i < 8 ? kTileRows - i : 8;
      for (int k = 0; k < 8; ++k)
        __builtin_memcpy(turned[k] + i, to[k], static_cast<uint64_t>(rows) * 4);
    }
    for (int64_t k = 0; k < keys; ++k)
      for (int v = 0; v < r.vecs; ++v)
        add_bias(s + (j + k) * kTileRows + v * kWidth, load(turned[k] + v * kWidth));
  }
}

// Where the relative biases of a tile's first row and `key` lie; those of the next rows follow, of
// the next key they begin one place before. (All rows are of one head.)
inline const float* relative_bias(const RelativeBias& b, const Rows& r, int64_t key) {
  return b.data + r.head[0] * b.head + b.zero + r.row[0] - key;
}

// Draws of a tile's rows for 4 keys at a time.
struct Draws {
  VI rows, words[4];
  VF keep;
  uint32_t sequence_head;

  Draws(const AttentionParams& p, const Rows& r, int64_t sequence, int vec)
      : keep(set1(p.dropout.scale)),
        sequence_head(static_cast<uint32_t>(sequence * p.q_heads + r.head[0])) {
    rows = seti(static_cast<uint32_t>(r.row[0] + vec * kWidth)) + iota();
  }
  void draw(const AttentionDropout& d, int64_t key) {
    words[0] = seti(static_cast<uint32_t>(key / 4)), words[1] = rows;
    words[2] = seti(sequence_head), words[3] = seti(d.offset);
    philox_rounds(words, d.key[0], d.key[1]);
  }
  // A weight of key `key`, dropped or multiplied.
  VF operator()(const AttentionDropout& d, int64_t key, VF weight) const {
    return select(above(seti(d.below), words[key % 4]), set1(0.0f), weight * keep);
  }
};

// Keys that a row does not see get -inf, whatever the product gave.
inline void hide_keys(const Rows& r, int64_t key, int64_t n, float* s) {
  for (int v = 0; v < r.vecs; ++v) {
    const VI first = load(r.first + v * kWidth), last = load(r.last + v * kWidth);
    for (int64_t j = 0; j < n; ++j) {
      const VI at = seti(static_cast<uint32_t>(key + j));
      float* const x = s + j * kTileRows + v * kWidth;
      const VF seen = select(lt(at, last), load(x), minus_infinity());
      store(x, select(lt(at, first), minus_infinity(), seen));
    }
  }
}

}  // namespace
TENFOLD_ISA_END
