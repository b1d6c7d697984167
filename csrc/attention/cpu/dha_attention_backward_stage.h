// SPDX-License-Identifier: Apache-2.0
// Operands of dha_attention_backward in the layouts that its products read. For ISA sources.
//
// For a product summed over d the lanes hold keys: k^T and v^T in panels [kBlock /
// kLanes][D][kLanes]. For one summed over queries or keys the lanes hold d: rows as they are. With
// Dot, a word holds two neighbours along the summed dimension: (d, d + 1), or rows (r, r + 1).
#pragma once

#include "attention/cpu/dha_attention_backward_tile.h"

TENFOLD_ISA_BEGIN
namespace {

// Rows of float32, zero-padded to `pitch`.
template <class T>
inline void stage_row(const T* from, int64_t dim, float* to, int64_t pitch) {
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) store(to + d, load(from + d));
  if (d < dim) {
    store(to + d, load_n(from + d, static_cast<int>(dim - d)));
    d += kWidth;
  }
  for (; d < pitch; d += kWidth) store(to + d, set1(0.0f));
}

inline void clear_words(void* to, int64_t words) {
  auto* at = static_cast<uint32_t*>(to);
  for (int64_t i = 0; i < words; i += kWidth) store(at + i, seti(0));
}

// Rows [0, num) of a tensor as the broadcast operand of a product over d (`along_d`) and as the
// vector operand of a product over rows (`along_rows`); for Fma both are the same memory.
template <class T>
inline void stage_rows(const T* from, int64_t row, int64_t num, int64_t padded, int64_t dim,
                       float* along_d, int64_t pitch, float*, int64_t) {
  for (int64_t r = 0; r < num; ++r) stage_row(from + r * row, dim, along_d + r * pitch, pitch);
  if (padded > num) clear_words(along_d + num * pitch, (padded - num) * pitch);
}

// Keys [0, num) in panels; lanes past the end are 0.
inline void stage_panels(const float* rows, int64_t pitch, int64_t num, int64_t dim,
                         float* panels) {
  for (int64_t first = 0; first < num; first += kLanes, panels += dim * kLanes) {
    const int64_t left = num - first;
    for (int j = 0; j < kLanes; ++j) {
      const float* from = rows + (first + j) * pitch;
      for (int64_t d = 0; d < dim; ++d) panels[d * kLanes + j] = j < left ? from[d] : 0.0f;
    }
  }
}

#if defined(TENFOLD_ISA_BF16)
inline VI widen(const bf16_t* p, int n) {
  return {_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_n(n), p))};
}

// Words (a[d], b[d]).
inline void interleave(const bf16_t* a, const bf16_t* b, int64_t dim, uint32_t* to, int64_t pitch) {
  for (int64_t d = 0; d < pitch; d += kWidth) {
    const int n = static_cast<int>(dim - d < kWidth ? dim - d : kWidth);
    if (n <= 0) {
      store(to + d, seti(0));
      continue;
    }
    const VI low = widen(a + d, n), high = b == nullptr ? seti(0) : widen(b + d, n);
    store(to + d, low | VI{_mm512_slli_epi32(high.v, 16)});
  }
}

inline void copy_words(const bf16_t* from, int64_t dim, uint32_t* to, int64_t pitch) {
  for (int64_t w = 0; w < pitch; w += 16) {
    const int64_t left = dim - 2 * w;
    const auto mask = left >= 32 ? ~__mmask32{0} : left <= 0 ? 0 : (__mmask32{1} << left) - 1;
    _mm512_storeu_si512(to + w, _mm512_maskz_loadu_epi16(mask, from + 2 * w));
  }
}

inline void stage_rows(const bf16_t* from, int64_t row, int64_t num, int64_t padded, int64_t dim,
                       uint32_t* along_d, int64_t d_pitch, uint32_t* along_rows,
                       int64_t rows_pitch) {
  for (int64_t r = 0; r < num; ++r) {
    if (along_d != nullptr) copy_words(from + r * row, dim, along_d + r * d_pitch, d_pitch);
    if (r % 2 == 0)
      interleave(from + r * row, r + 1 < num ? from + (r + 1) * row : nullptr, dim,
                 along_rows + r / 2 * rows_pitch, rows_pitch);
  }
  if (along_d != nullptr && padded > num)
    clear_words(along_d + num * d_pitch, (padded - num) * d_pitch);
  const int64_t used = (num + 1) / 2, all = (padded + 1) / 2;
  if (all > used) clear_words(along_rows + used * rows_pitch, (all - used) * rows_pitch);
}

// Pairs (d, d + 1) of keys [0, num) in panels; lanes past the end and d past `dim` are 0.
inline void stage_panels(const bf16_t* rows, int64_t row, int64_t num, int64_t dim,
                         uint32_t* panels) {
  const int64_t words = (dim + 1) / 2;
  for (int64_t first = 0; first < num; first += kLanes, panels += words * kLanes) {
    const int64_t left = num - first;
    for (int j = 0; j < kLanes; ++j) {
      const bf16_t* from = rows + (first + j) * row;
      for (int64_t w = 0; w < words; ++w) {
        uint32_t word = 0;
        if (j < left) __builtin_memcpy(&word, from + 2 * w, 2 * w + 1 < dim ? 4 : 2);
        panels[w * kLanes + j] = word;
      }
    }
  }
}
#endif

// Memory of a task, in words. Queries: a chunk; keys: a block.
template <class M>
struct Operands {
  using Word = typename M::Word;
  int64_t d_pitch, dv_pitch;            // rows of q and dout as the broadcast operand
  int64_t rows_pitch, rows_dv_pitch;    // rows of q, k and dout as the vector operand
  Word *q, *dout, *q_rows, *dout_rows;  // [kChunk]
  Word *k_panels, *v_panels, *k_rows;   // [kBlock]
  float *dq, *lse2, *lse2_low, *delta;  // [kChunk]: dq [.., rows_pitch]
  float *prob, *slope;  // of one panel of the tile [kBlock][kLanes]: P and the softcap's derivative
  Word *p, *ds, *ds_rows;  // the tile; ds_rows [queries][keys], the others along rows
  float* ds_floats;        // for its diagonals: [queries][kTilePitch], zeros before and in between
  uint32_t* keep;          // [queries][kKeepPitch]: which weights are not dropped, a bit each
};

constexpr int64_t kMargin = 16, kKeepPitch = (kBlock + 4 * kWidth - 1) / (4 * kWidth) * 4;

// Words of a row of Operands::ds_rows.
template <class M>
constexpr int64_t kDsPitch = M::kDepth == 1 ? kTilePitch : (kBlock / 2 / 16 | 1) * 16;

constexpr int64_t kChunk = 5 * kBlock;  // queries staged at a time: 1.1 MB float32 of 128

// Lays the operands out from `at` on; how many words that takes.
template <class M>
inline int64_t lay_out(const AttentionBackward& p, uint32_t* at, Operands<M>* o) {
  using Word = typename M::Word;
  constexpr int kDepth = M::kDepth;
  const int64_t d = p.head_dim, dv = p.value_dim;
  const uint32_t* const start = at;
  const auto take = [&](int64_t words) {
    auto* const here = reinterpret_cast<Word*>(at);
    at += round_up(words, 16);
    return here;
  };
  o->d_pitch = spread(round_up(d, kDepth) / kDepth);
  o->dv_pitch = spread(round_up(dv, kDepth) / kDepth);
  o->rows_pitch = spread(d), o->rows_dv_pitch = spread(dv);
  o->q = take(kChunk * o->d_pitch), o->dout = take(kChunk * o->dv_pitch);
  o->q_rows = kDepth == 1 ? o->q : take(kChunk / kDepth * o->rows_pitch);
  o->dout_rows = kDepth == 1 ? o->dout : take(kChunk / kDepth * o->rows_dv_pitch);
  o->k_panels = take(kBlock * round_up(d, kDepth) / kDepth);
  o->v_panels = take(kBlock * round_up(dv, kDepth) / kDepth);
  const int64_t wider = d > dv ? d : dv;  // float32: v passes through on its way to its panels
  o->k_rows = take(kBlock / kDepth * spread(wider));
  o->dq = reinterpret_cast<float*>(take(kChunk * o->rows_pitch));
  o->lse2 = reinterpret_cast<float*>(take(kChunk));
  o->lse2_low = reinterpret_cast<float*>(take(kChunk));
  o->delta = reinterpret_cast<float*>(take(kChunk));
  o->prob = reinterpret_cast<float*>(take(kBlock * kLanes));
  o->slope = reinterpret_cast<float*>(take(kBlock * kLanes));
  o->p = take(kBlock / kDepth * kTilePitch);
  take(kMargin);
  o->ds = take(kBlock / kDepth * kTilePitch);
  o->ds_rows = kDepth == 1 ? o->ds : take(kBlock * kDsPitch<M>);
  o->ds_floats = reinterpret_cast<float*>(o->ds);
  if (kDepth > 1 && p.relative.data != nullptr) {
    take(kMargin);
    o->ds_floats = reinterpret_cast<float*>(take(kBlock * kTilePitch));
  }
  o->keep = p.dropout.below != 0 ? reinterpret_cast<uint32_t*>(take(kBlock * kKeepPitch)) : nullptr;
  return at - start;
}

// Which weights of queries [i0, i0 + rows) and keys [j0, j0 + keys) are kept: a bit each, words of
// a row one after another.
inline void draw_tile(const AttentionDropout& drop, uint32_t sequence_head, int64_t i0,
                      int64_t rows, int64_t j0, int64_t keys, uint32_t* keep) {
  const VI below = seti(drop.below), lanes = counter_lanes();
  alignas(64) uint32_t drawn[4 * kWidth];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < keys; j += 4 * kWidth) {
      VI words[4] = {lanes + seti(static_cast<uint32_t>((j0 + j) / 4)),
                     seti(static_cast<uint32_t>(i0 + r)), seti(sequence_head), seti(drop.offset)};
      philox_rounds(words, drop.key[0], drop.key[1]);
      store_by_four(drawn, words[0], words[1], words[2], words[3]);
      for (int i = 0; i < 4; ++i)
        keep[r * kKeepPitch + j / kWidth + i] = ~bits_of(above(below, load(drawn + i * kWidth)));
    }
}

// Adds the sums of a tile's diagonals to to[key - query], kWidth of them at a time: of the next row
// they begin one place on. Between its rows the tile has zeros.
inline void sum_diagonals(float* ds, int64_t rows, int64_t keys, float* to) {
  static_assert(kTilePitch - kBlock >= kWidth);
  const int64_t filled = round_up(keys, kLanes);
  for (int64_t r = 0; filled < kBlock && r < rows; ++r)
    clear_words(ds + r * kTilePitch + filled, kBlock - filled);
  for (int64_t d = -kBlock; d < keys; d += kWidth) {
    const int64_t first = d + kWidth > 0 ? 0 : 1 - kWidth - d;
    const int64_t last = rows < kBlock - d ? rows : kBlock - d;
    const float* const from = ds + d;
    VF sums[4] = {load(to + d), set1(0.0f), set1(0.0f), set1(0.0f)};
    int64_t r = first;
    for (; r + 4 <= last; r += 4)
      for (int i = 0; i < 4; ++i) sums[i] = sums[i] + load(from + (r + i) * (kTilePitch + 1));
    for (; r < last; ++r) sums[0] = sums[0] + load(from + r * (kTilePitch + 1));
    store(to + d, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

}  // namespace
TENFOLD_ISA_END
