// SPDX-License-Identifier: Apache-2.0
// Device code of kv_gather and kv_compact_. One kernel moves rows, K and V in one launch; a step of
// a block moves many rows: thread = (row, column), where a column is 16 bytes, one element, or one
// pair to rotate, and each thread takes kBatch rows a step, all loads before the first store.
//   Gather:     one block per step of rows.
//   Compaction: a block walks over all rows of one (batch, head) in ascending order. Its columns
//   are
//               its own, so blocks may share a head, by column slices. Race-free, because the rows
//               of a step are loaded before a barrier and stored after it, and what a later step
//               loads (rows at or above its own slots) no earlier step stores to.
#pragma once

#include "core/convert.cuh"

namespace tenfold::cuda {

struct MoveSide {
  const char* from;
  char* to;
  int64_t heads, dim;
  int64_t from_stride[3], to_stride[3];  // bytes: batch, head, row
  bool vectors;                          // rows are whole, aligned 16-byte vectors
  // Filled by plan_move:
  int64_t columns;        // of a row; 0: nothing to move
  int64_t slice, slices;  // columns of one block, slices of a row
  int64_t chunk, chunks;  // slots of one block, chunks of a head
};

struct MoveArgs {
  MoveSide side[2];  // k, v
  IntArray idx;      // [B, Hi, C], contiguous
  IntArray new_lens, kv_start;
  bool lens_per_head;
  const float* inv_freq;  // [D / 2] or null
  int64_t batch, length, width, index_heads;
};

// A block of a compaction walks alone over all slots of its columns: more threads, more in flight.
constexpr int kGatherThreads = 256, kCompactThreads = 512;
constexpr int64_t kMoveBatch = 8;  // rows a thread loads before it stores
constexpr int64_t kWantedBlocks = 264, kSliceBytes = 64;

__device__ inline int64_t used_slots(const MoveArgs& a, int64_t b, int64_t hi) {
  if (!a.new_lens.given()) return a.width;
  const int64_t n = a.new_lens[a.lens_per_head ? b * a.index_heads + hi : b];
  return n < 0 ? 0 : n > a.width ? a.width : n;
}

// cos and sin of the rotation of one pair: the angle is formed in double, as on the CPU.
__device__ inline void rotation(const MoveArgs& a, int64_t b, int64_t c, int64_t token, int64_t i,
                                float* cosine, float* sine) {
  const int64_t start = a.kv_start.given() ? a.kv_start[b] : 0;
  const double angle =
      static_cast<double>(c - (token - start)) * static_cast<double>(a.inv_freq[i]);
  *cosine = static_cast<float>(cos(angle));
  *sine = static_cast<float>(sin(angle));
}

// What a thread moves of a row: how it is held between load and store. V is uint4 or the element.
template <class V>
struct PlainColumn {
  static constexpr int kBatch = kMoveBatch;
  using Held = V;
  __device__ V load(const char* row, int64_t i) const { return reinterpret_cast<const V*>(row)[i]; }
  __device__ void store(char* row, int64_t i, const V& held, int64_t, int64_t) const {
    reinterpret_cast<V*>(row)[i] = held;
  }
};

template <class T>
struct RotatedPair {
  static constexpr int kBatch = 2;  // a batch is unrolled, and sines are long
  struct Held {
    T low, high;
  };
  const MoveArgs& a;
  int64_t b, half;
  __device__ Held load(const char* row, int64_t i) const {
    const T* x = reinterpret_cast<const T*>(row);
    return {x[i], x[i + half]};
  }
  __device__ void store(char* row, int64_t i, const Held& held, int64_t c, int64_t token) const {
    T* x = reinterpret_cast<T*>(row);
    float cosine = 1.0f, sine = 0.0f;  // an unused slot holds zeros
    if (token >= 0) rotation(a, b, c, token, i, &cosine, &sine);
    const float x1 = to_float(held.low), x2 = to_float(held.high);
    from_float(x1 * cosine - x2 * sine, x + i);
    from_float(x2 * cosine + x1 * sine, x + i + half);
  }
};

// What one block moves: columns [column0, column0 + columns) of slots [begin, end) of a head.
struct MoveBlock {
  int64_t b, hi;
  const char* from;
  char* to;
  int64_t column0;
  int columns;
  int64_t begin, end, used;
};

// Source token of a slot, or -1: unused, negative or out of range. In place also -1 if the token is
// below its slot: that breaks the contract (strictly increasing indices) and its row may be
// overwritten already, so the slot is left alone, as an unused one is.
template <bool kInPlace>
__device__ inline int token_of(const MoveArgs& a, const MoveBlock& m, int64_t c) {
  if (c >= m.used) return -1;
  const int64_t token = a.idx[(m.b * a.index_heads + m.hi) * a.width + c];
  const bool valid = token >= (kInPlace ? c : 0) && token < a.length;
  return valid ? static_cast<int>(token) : -1;  // slots fit in 32 bits, checked by the op
}

template <bool kInPlace, class Column>
__device__ inline void move_rows(const MoveArgs& a, const MoveSide& s, const MoveBlock& m,
                                 Column column) {
  constexpr int kThreads = kInPlace ? kCompactThreads : kGatherThreads;
  constexpr int kBatch = Column::kBatch;
  const int groups = kThreads / m.columns, group = static_cast<int>(threadIdx.x) / m.columns;
  const int64_t i = m.column0 + static_cast<int>(threadIdx.x) % m.columns;
  const bool idle = group >= groups;  // left over; stays for the barriers
  for (int64_t c0 = m.begin; c0 < m.end; c0 += groups * kBatch) {
    typename Column::Held held[kBatch];
    int token[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int64_t c = c0 + n * groups + group;
      token[n] = idle || c >= m.end ? -1 : token_of<kInPlace>(a, m, c);
      held[n] = {};
      if (token[n] >= 0) held[n] = column.load(m.from + token[n] * s.from_stride[2], i);
    }
    if constexpr (kInPlace) __syncthreads();
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int64_t c = c0 + n * groups + group;
      if (kInPlace ? token[n] >= 0 : !idle && c < m.end)
        column.store(m.to + c * s.to_stride[2], i, held[n], c, token[n]);
    }
  }
}

template <class T, bool kInPlace>
__global__ void __launch_bounds__(kInPlace ? kCompactThreads : kGatherThreads)
    kv_move_kernel(MoveArgs a) {
  const int64_t key_blocks = a.batch * a.side[0].heads * a.side[0].slices * a.side[0].chunks;
  int64_t at = blockIdx.x;
  const bool is_key = at < key_blocks;
  const MoveSide& s = a.side[is_key ? 0 : 1];
  if (!is_key) at -= key_blocks;
  const int64_t begin = at % s.chunks * s.chunk;
  at /= s.chunks;
  const int64_t column0 = at % s.slices * s.slice;
  at /= s.slices;
  const int64_t h = at % s.heads, b = at / s.heads, hi = a.index_heads == 1 ? 0 : h;
  const int64_t columns = s.columns - column0 < s.slice ? s.columns - column0 : s.slice;
  const int64_t used = used_slots(a, b, hi), last = kInPlace ? used : a.width;
  const MoveBlock m{b,
                    hi,
                    s.from + b * s.from_stride[0] + h * s.from_stride[1],
                    s.to + b * s.to_stride[0] + h * s.to_stride[1],
                    column0,
                    static_cast<int>(columns),
                    begin,
                    begin + s.chunk < last ? begin + s.chunk : last,
                    used};
  if (is_key && a.inv_freq != nullptr) {
    move_rows<kInPlace>(a, s, m, RotatedPair<T>{a, b, s.dim / 2});
  } else if (s.vectors) {
    move_rows<kInPlace>(a, s, m, PlainColumn<uint4>{});
  } else {
    move_rows<kInPlace>(a, s, m, PlainColumn<T>{});
  }
}

// Splits the work into blocks and returns their number. A gather has a block per step. A compaction
// has at least one per head, and if these are too few to fill a large GPU, rows are cut into slices
// of 64 bytes or more (two sectors: less would waste memory traffic).
template <class T>
int64_t plan_move(MoveArgs& a, bool in_place) {
  const int64_t threads = in_place ? kCompactThreads : kGatherThreads;
  int64_t blocks = 0;
  for (int side = 0; side < 2; ++side) {
    MoveSide& s = a.side[side];
    const bool rotated = side == 0 && a.inv_freq != nullptr;
    const int64_t size = static_cast<int64_t>(sizeof(T)), unit = !rotated && s.vectors ? 16 : size;
    s.columns = rotated ? s.dim / 2 : s.dim * size / unit;
    s.slice = s.columns < threads ? s.columns : threads;
    const int64_t heads = a.batch * (a.side[0].heads + a.side[1].heads);
    if (in_place && heads > 0 && heads < kWantedBlocks) {
      const int64_t cuts = (kWantedBlocks + heads - 1) / heads, least = kSliceBytes / unit;
      const int64_t wanted = ((s.columns + cuts - 1) / cuts + least - 1) / least * least;
      s.slice = s.slice < wanted ? s.slice : wanted;
    }
    const int64_t batch = rotated ? RotatedPair<T>::kBatch : kMoveBatch;
    s.chunk = in_place || s.slice == 0 ? a.width : threads / s.slice * batch;
    s.slices = s.slice > 0 ? (s.columns + s.slice - 1) / s.slice : 0;
    s.chunks = s.chunk > 0 ? (a.width + s.chunk - 1) / s.chunk : 0;
    blocks += a.batch * s.heads * s.slices * s.chunks;
  }
  return blocks;
}

// `blocks` is what plan_move returned.
template <class T>
void launch_kv_gather(const MoveArgs& a, int64_t blocks, cudaStream_t stream) {
  if (blocks > 0)
    TENFOLD_LAUNCH((kv_move_kernel<T, false>), static_cast<unsigned>(blocks), kGatherThreads,
                   stream, a);
}

template <class T>
void launch_kv_compact(const MoveArgs& a, int64_t blocks, cudaStream_t stream) {
  if (blocks > 0)
    TENFOLD_LAUNCH((kv_move_kernel<T, true>), static_cast<unsigned>(blocks), kCompactThreads,
                   stream, a);
}

}  // namespace tenfold::cuda
