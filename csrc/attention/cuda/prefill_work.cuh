// SPDX-License-Identifier: Apache-2.0
// Which part of a dha_attention problem a block works on, shared by the forward and the backward.
// Blocks of one dimension: (batch, head, tile of rows) for a dense batch, (head, slot) for a packed
// one. Query heads are taken in the order of their key heads, so that blocks that run together read
// the same keys. Of a causal mask, the last tile of queries sees the most keys and the first tile
// of keys is seen by the most queries: a dense batch starts with these.
#pragma once

#include "attention/dha_attention.h"
#include "core/mma_tile.cuh"

namespace tenfold::cuda {

struct Side {      // rows of the queries, or of the keys and values
  IntArray cu;     // packed: [B + 1]
  int64_t length;  // dense: rows of each sequence; packed: rows in all
};

// What the device needs beside the parameters of the contract; pointers there to maps and
// cu_seqlens are not used.
template <class Params>
struct OnDevice : Params {
  IntArray q_to_k, q_to_v;  // query head -> key head, value head
  Side queries, keys;
  IntArray kv_len;            // dense: keys of each sequence; not given: all
  const float* relative_lut;  // [H][2 reach + 1] biases of key - query - place, or null
  int reach;
  bool q_vectors, k_vectors, v_vectors, out_vectors;  // rows are whole, aligned 16-byte vectors
};

TENFOLD_HD int64_t clamped(int64_t x, int64_t most) {
  return x < 0 ? 0 : x > most ? most : x;
}

// First row of sequence b of a packed side. Sequence B is what lies behind the last one: it belongs
// to nobody, but its results are defined (they are those of rows that see nothing).
TENFOLD_HD int64_t first_row(const Side& s, int64_t batch, int64_t b) {
  return b > batch ? s.length : clamped(s.cu[b], s.length);
}

struct Rows {
  int64_t first, count;
};

TENFOLD_HD Rows sequence_rows(const Side& s, int64_t batch, int64_t b) {
  if (!s.cu.given()) return {0, s.length};
  const int64_t first = first_row(s, batch, b), next = first_row(s, batch, b + 1);
  return {first, next > first ? next - first : 0};
}

// The keys of a sequence.
template <class Params>
TENFOLD_HD Rows key_rows(const OnDevice<Params>& p, int64_t b) {
  if (p.kv_len.given()) return {0, clamped(p.kv_len[b], p.keys.length)};
  return sequence_rows(p.keys, p.batch, b);
}

// Tiles of a head: a packed side numbers them without knowing any length on the host: sequence b
// has the slots from first_row / tile + b on, which leaves each sequence enough of them.
TENFOLD_HD int64_t tiles_per_head(const Side& s, int64_t batch, int tile) {
  return s.cu.given() ? s.length / tile + batch + 1 : batch * ((s.length + tile - 1) / tile);
}

struct Work {
  int64_t batch, head, first;  // first: row of the tile in its sequence; -1: nothing to do
};

// head: the block's head in launch order. last_first: which tiles of a dense batch come first.
TENFOLD_HD Work find_work(const Side& s, int64_t batch, int64_t heads, int tile, int64_t block,
                          bool last_first) {
  if (!s.cu.given()) {
    const int64_t tiles = (s.length + tile - 1) / tile, t = block % tiles, rest = block / tiles;
    return {rest / heads, rest % heads, (last_first ? tiles - 1 - t : t) * tile};
  }
  const int64_t slots = tiles_per_head(s, batch, tile), slot = block % slots;
  int64_t lo = 0, hi = batch + 1;  // the sequence is in [lo, hi)
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    if (first_row(s, batch, mid) / tile + mid <= slot) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  const int64_t t = slot - first_row(s, batch, lo) / tile - lo;
  const bool some = t >= 0 && t * tile < sequence_rows(s, batch, lo).count;
  return {lo, block / slots, some ? t * tile : -1};
}

// The query head at place `rank` in the order of (key head, query head); all threads call it.
__device__ inline int64_t ranked_head(const IntArray& map, int64_t heads, int64_t rank, int* slot) {
  for (int64_t h = threadIdx.x; h < heads; h += blockDim.x) {
    const int64_t mine = map[h];
    int64_t before = 0;
    for (int64_t other = 0; other < heads; ++other) {
      const int64_t x = map[other];
      before += x < mine || (x == mine && other < h);
    }
    if (before == rank) *slot = static_cast<int>(h);
  }
  __syncthreads();
  return *slot;
}

// A row of a [B, H, S, D] or packed tensor.
template <class T>
__device__ inline const T* row_at(const void* data, const RowLayout& at, int64_t b, int64_t head,
                                  int64_t row) {
  return static_cast<const T*>(data) + b * at.batch + head * at.head + row * at.row;
}

// A position relative to a tile, cut to it.
TENFOLD_HD int in_tile(int64_t x, int tile) {
  return x < 0 ? 0 : x > tile ? tile : static_cast<int>(x);
}

// The columns of a tile that rows see which follow each other: row i those of [lo(i), hi(i)). Made
// from the range of row 0 relative to the tile, not cut to it, that moves on with the row, and what
// no row goes beyond. 32 bits: four rows' ranges take fewer registers than one did.
template <int kTile>
struct TileRange {
  int first, last, most;

  __device__ TileRange(int64_t first_of_0, int64_t last_of_0, int64_t end)
      : first(cut_far(first_of_0)), last(cut_far(last_of_0)), most(in_tile(end, kTile)) {}
  __device__ int lo(int i) const { return cut(first + i, kTile); }
  __device__ int hi(int i) const { return cut(last + i, most); }

 private:
  static constexpr int kFar = 1 << 24;  // no tile has so many rows
  __device__ static int cut_far(int64_t x) {
    return x < -kFar ? -kFar : x > kFar ? kFar : static_cast<int>(x);
  }
  __device__ static int cut(int x, int most) { return x < 0 ? 0 : x > most ? most : x; }
};

// The bias of one (batch, query head).
__device__ inline AttentionBias bias_of(const AttentionBias& all, int64_t b, int64_t h) {
  AttentionBias one = all;
  if (all.data == nullptr) return one;
  const int64_t size = all.kind == BiasKind::boolean ? 1 : all.kind == BiasKind::f32 ? 4 : 2;
  one.data = static_cast<const char*>(all.data) + (b * all.batch + h * all.head) * size;
  return one;
}

// The bias of a logit in natural units: 0 or -inf for a boolean one.
__device__ inline float bias_at(const AttentionBias& bias, int64_t at) {
  switch (bias.kind) {
    case BiasKind::boolean:
      return static_cast<const uint8_t*>(bias.data)[at] ? 0.0f : bits_to_float(0xFF800000u);
    case BiasKind::f32: return static_cast<const float*>(bias.data)[at];
    case BiasKind::bf16: return to_float(static_cast<const bf16_t*>(bias.data)[at]);
    default: return to_float(static_cast<const fp16_t*>(bias.data)[at]);
  }
}

// Relative biases of the distances first, first + 1 ... that meet in a tile: [count] in shared
// memory.
template <class Params>
__device__ inline void load_window(const OnDevice<Params>& p, int64_t head, int64_t first,
                                   int count, float* window) {
  const float* const lut = p.relative_lut + head * (2 * p.reach + 1);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t r = first + i;
    window[i] = lut[r < -p.reach ? 0 : r > p.reach ? 2 * p.reach : r + p.reach];
  }
}

// Whether rows can be read as 16-byte vectors.
inline bool row_vectors(const void* data, const RowLayout& at, int64_t dims, int64_t size) {
  const int64_t bits = (at.batch | at.head | at.row | dims) * size;
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(bits)) % 16 == 0;
}

}  // namespace tenfold::cuda
