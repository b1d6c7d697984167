// Device code of kv_gather and kv_compact_.
// Gather: one warp per output row, 16-byte vectors where rows allow, K and V in one launch.
// Compaction: a group of threads per (batch, head, side); each thread owns one column (16 bytes, or
// one rotated pair) and moves it token by token in ascending order, kBatch loads before their
// stores. idx increases, so a store to slot c never hits a slot >= idx[c + kBatch] that is still to
// be read.
#pragma once

#include "core/convert.cuh"

namespace tenfold::cuda {

struct MoveSide {
  const char* from;
  char* to;
  int64_t heads, dim;
  int64_t from_stride[3], to_stride[3];  // bytes: batch, head, row
  bool vectors;                          // rows are whole, aligned 16-byte vectors
};

struct MoveArgs {
  MoveSide side[2];  // k, v
  IntArray idx;      // [B, Hi, C], contiguous
  IntArray new_lens, kv_start;
  bool lens_per_head;
  const float* inv_freq;  // [D / 2] or null
  int64_t batch, length, width, index_heads;
};

constexpr int kMoveThreads = 128;
constexpr int kBatch = 8;

__device__ inline int64_t used_slots(const MoveArgs& a, int64_t b, int64_t hi) {
  if (!a.new_lens.given()) return a.width;
  const int64_t n = a.new_lens[a.lens_per_head ? b * a.index_heads + hi : b];
  return n < 0 ? 0 : n > a.width ? a.width : n;
}

// Source token of a slot, or -1: unused, negative or out of range.
__device__ inline int64_t token_of(const MoveArgs& a, int64_t b, int64_t hi, int64_t c) {
  if (c >= used_slots(a, b, hi)) return -1;
  const int64_t token = a.idx[(b * a.index_heads + hi) * a.width + c];
  return token < 0 || token >= a.length ? -1 : token;
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

template <class T>
__device__ inline void rotate_pair(T* to, const T* from, int64_t i, int64_t half, float c,
                                   float s) {
  const float x1 = to_float(from[i]), x2 = to_float(from[i + half]);
  from_float(x1 * c - x2 * s, to + i);
  from_float(x2 * c + x1 * s, to + i + half);
}

template <class T>
__global__ void __launch_bounds__(kMoveThreads) kv_gather_kernel(MoveArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t key_rows = a.batch * a.side[0].heads * a.width;
  const int64_t rows = key_rows + a.batch * a.side[1].heads * a.width;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kMoveThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kMoveThreads / 32) + threadIdx.x / 32;
       row < rows; row += warps) {
    const bool is_key = row < key_rows;
    const MoveSide& s = a.side[is_key ? 0 : 1];
    int64_t at = is_key ? row : row - key_rows;
    const int64_t c = at % a.width;
    at /= a.width;
    const int64_t h = at % s.heads, b = at / s.heads;
    const int64_t token = token_of(a, b, a.index_heads == 1 ? 0 : h, c);
    char* to = s.to + b * s.to_stride[0] + h * s.to_stride[1] + c * s.to_stride[2];
    const char* from =
        s.from + b * s.from_stride[0] + h * s.from_stride[1] + token * s.from_stride[2];
    const int64_t bytes = s.dim * static_cast<int64_t>(sizeof(T));
    if (token >= 0 && is_key && a.inv_freq != nullptr) {
      for (int64_t i = lane; i < s.dim / 2; i += 32) {
        float cosine, sine;
        rotation(a, b, c, token, i, &cosine, &sine);
        rotate_pair(reinterpret_cast<T*>(to), reinterpret_cast<const T*>(from), i, s.dim / 2,
                    cosine, sine);
      }
    } else if (s.vectors) {
      for (int64_t i = lane * 16; i < bytes; i += 512)
        *reinterpret_cast<uint4*>(to + i) =
            token >= 0 ? *reinterpret_cast<const uint4*>(from + i) : uint4{0, 0, 0, 0};
    } else {
      for (int64_t i = lane; i < s.dim; i += 32)
        reinterpret_cast<T*>(to)[i] = token >= 0 ? reinterpret_cast<const T*>(from)[i] : T{};
    }
  }
}

// The source of slot c in place. A token below its slot breaks the contract (strictly increasing
// indices) and its row may be overwritten already: the slot is left alone, as an unused one is.
__device__ inline int64_t token_below(const MoveArgs& a, int64_t b, int64_t hi, int64_t c) {
  const int64_t token = token_of(a, b, hi, c);
  return token >= c ? token : -1;
}

// Moves one column of type V at byte offset `column` down to the first slots.
template <class V>
__device__ inline void compact_column(const MoveArgs& a, const MoveSide& s, int64_t b, int64_t hi,
                                      char* base, int64_t column) {
  const int64_t used = used_slots(a, b, hi);
  for (int64_t c0 = 0; c0 < used; c0 += kBatch) {
    V held[kBatch];
    int64_t tokens[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      tokens[i] = token_below(a, b, hi, c0 + i);
      if (tokens[i] >= 0)
        held[i] = *reinterpret_cast<const V*>(base + tokens[i] * s.from_stride[2] + column);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (tokens[i] >= 0)
        *reinterpret_cast<V*>(base + (c0 + i) * s.to_stride[2] + column) = held[i];
  }
}

// Moves whole rows, `columns` 16-byte vectors each, with all threads of the block: many rows a
// step. All loads of a step come before its stores; later steps read rows at or above their own
// slots, which no earlier step has written.
__device__ inline void compact_rows(const MoveArgs& a, const MoveSide& s, int64_t b, int64_t hi,
                                    char* base, int columns) {
  const int64_t used = used_slots(a, b, hi);
  const int groups = kMoveThreads / columns, group = threadIdx.x / columns;
  const int64_t column = threadIdx.x % columns * 16;
  for (int64_t c0 = 0; c0 < used; c0 += groups * kBatch) {
    uint4 held[kBatch];
    bool moves[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t c = c0 + i * groups + group;
      const int64_t token = group < groups ? token_below(a, b, hi, c) : -1;
      moves[i] = token >= 0;
      if (moves[i])
        held[i] = *reinterpret_cast<const uint4*>(base + token * s.from_stride[2] + column);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (moves[i])
        *reinterpret_cast<uint4*>(base + (c0 + i * groups + group) * s.to_stride[2] + column) =
            held[i];
  }
}

template <class T>
__device__ inline void compact_rotated(const MoveArgs& a, const MoveSide& s, int64_t b, int64_t hi,
                                       char* base, int64_t pair) {
  const int64_t used = used_slots(a, b, hi), half = s.dim / 2;
  for (int64_t c = 0; c < used; ++c) {
    const int64_t token = token_below(a, b, hi, c);
    if (token < 0) continue;
    float cosine, sine;
    rotation(a, b, c, token, pair, &cosine, &sine);
    rotate_pair(reinterpret_cast<T*>(base + c * s.to_stride[2]),
                reinterpret_cast<const T*>(base + token * s.from_stride[2]), pair, half, cosine,
                sine);
  }
}

template <class T>
__global__ void __launch_bounds__(kMoveThreads) kv_compact_kernel(MoveArgs a) {
  const int64_t heads = a.side[0].heads + a.side[1].heads;
  const int64_t b = blockIdx.x / heads, at = blockIdx.x % heads;
  const bool is_key = at < a.side[0].heads;
  const MoveSide& s = a.side[is_key ? 0 : 1];
  const int64_t h = is_key ? at : at - a.side[0].heads, hi = a.index_heads == 1 ? 0 : h;
  char* base = s.to + b * s.to_stride[0] + h * s.to_stride[1];
  if (is_key && a.inv_freq != nullptr) {
    for (int64_t i = threadIdx.x; i < s.dim / 2; i += kMoveThreads)
      compact_rotated<T>(a, s, b, hi, base, i);
  } else if (s.vectors) {
    const int64_t columns = s.dim * static_cast<int64_t>(sizeof(T)) / 16;
    if (columns <= kMoveThreads) {
      compact_rows(a, s, b, hi, base, static_cast<int>(columns));
      return;
    }
    for (int64_t i = threadIdx.x; i < columns; i += kMoveThreads)
      compact_column<uint4>(a, s, b, hi, base, i * 16);
  } else {
    for (int64_t i = threadIdx.x; i < s.dim; i += kMoveThreads)
      compact_column<T>(a, s, b, hi, base, i * static_cast<int64_t>(sizeof(T)));
  }
}

template <class T>
void launch_kv_gather(const MoveArgs& a, cudaStream_t stream) {
  const int64_t rows = a.batch * (a.side[0].heads + a.side[1].heads) * a.width;
  if (rows == 0) return;
  const int64_t blocks = (rows + kMoveThreads / 32 - 1) / (kMoveThreads / 32);
  TENFOLD_LAUNCH(kv_gather_kernel<T>, static_cast<unsigned>(blocks < 1 << 20 ? blocks : 1 << 20),
                 kMoveThreads, stream, a);
}

template <class T>
void launch_kv_compact(const MoveArgs& a, cudaStream_t stream) {
  const int64_t blocks = a.batch * (a.side[0].heads + a.side[1].heads);
  if (blocks > 0 && a.width > 0)
    TENFOLD_LAUNCH(kv_compact_kernel<T>, static_cast<unsigned>(blocks), kMoveThreads, stream, a);
}

}  // namespace tenfold::cuda
