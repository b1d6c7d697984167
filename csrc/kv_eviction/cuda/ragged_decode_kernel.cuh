// SPDX-License-Identifier: Apache-2.0
// Device code of ragged_decode: one block per (segment, chunk of keys), all query rows of the head
// share what it loads. Per group of kRows rows: logits (a few lanes per key, 16 bytes each, so that
// a warp reads several keys at once), softmax weights of the chunk in shared memory, then values (a
// thread per value dim). A second kernel combines the chunks of each row in order.
#pragma once

#include "core/convert.cuh"

namespace tenfold::cuda {

struct DecodeArgs {
  const void* q;   // [B, Hq, Sq, D]
  const void* k;   // [N, D]
  const void* v;   // [N, DV]
  void* out;       // [B, Hq, Sq, DV] contiguous
  float* lse;      // [B, Hq, Sq]
  float* partial;  // [chunk_slots(), rows, 2 + DV]
  IntArray offsets, lens;
  int64_t q_stride[4], k_stride, v_stride;
  int64_t batch, q_heads, kv_heads, group, num_queries, head_dim, value_dim, total_rows;
  float scale;
  bool k_vectors;  // rows of k are whole, aligned 16-byte vectors
};

constexpr int kDecodeThreads = 128, kDecodeWarps = kDecodeThreads / 32, kChunkKeys = 256;
constexpr int kMaxDim = 256;
constexpr float kNoLogit = -1e30f;

// Chunks are numbered without knowing any length on the host: segment i gets the slots from
// offsets[i] / kChunkKeys + i on, which leaves each segment enough of them.
inline int64_t chunk_slots(const DecodeArgs& a) {
  return a.total_rows / kChunkKeys + a.batch * a.kv_heads + 1;
}

__device__ inline int64_t first_chunk(const DecodeArgs& a, int64_t segment) {
  int64_t at = a.offsets[segment];
  at = at < 0 ? 0 : at > a.total_rows ? a.total_rows : at;
  return at / kChunkKeys + segment;
}

// The segment whose slots hold `slot`, or -1.
__device__ inline int64_t segment_of(const DecodeArgs& a, int64_t slot) {
  int64_t lo = 0, hi = a.batch * a.kv_heads;  // the answer is in [lo, hi)
  if (first_chunk(a, 0) > slot) return -1;
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    if (first_chunk(a, mid) <= slot) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

struct SegmentRange {
  int64_t begin, length;
};

__device__ inline SegmentRange segment_range(const DecodeArgs& a, int64_t i) {
  int64_t begin = a.offsets[i], end = a.offsets[i + 1];
  begin = begin < 0 ? 0 : begin > a.total_rows ? a.total_rows : begin;
  end = end < begin ? begin : end > a.total_rows ? a.total_rows : end;
  int64_t n = a.lens.given() ? a.lens[i] : end - begin;
  n = n < 0 ? 0 : n > end - begin ? end - begin : n;
  return {begin, n};
}

__device__ inline float larger_or_nan(float a, float b) {
  return b > a || b != b ? b : a;
}

// 4 floats, 16-byte aligned, in one load.
__device__ inline void load4(const float* from, float* to) {
  const uint4 x = *reinterpret_cast<const uint4*>(from);
  memcpy(to, &x, sizeof(x));
}

// Where dim d of a row lies in q_tile. The lanes of a key read vectors of kPer dims: with 8, the
// halves lie apart, so that neighbouring lanes read neighbouring 16 bytes.
template <int kPer>
__device__ inline int q_slot(int d) {
  return kPer == 8 ? d % 8 / 4 * (kMaxDim / 2) + d / 8 * 4 + d % 4 : d;
}

// weights[key][row] = logits of the chunk's keys, -inf where a row does not see the key. V: uint4
// or T, what a lane loads at once; a power of two of lanes share a key.
template <class T, class V, int kRows>
__device__ inline void chunk_logits(const DecodeArgs& a, const T* k, int keys, const float* q_tile,
                                    const int* visible, float* weights) {
  constexpr int kPer = static_cast<int>(sizeof(V) / sizeof(T)), kQuad = kPer < 4 ? kPer : 4;
  constexpr int kAhead = kRows > 4 ? 2 : 4;  // keys that a lane has in flight
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int vectors = static_cast<int>(a.head_dim) / kPer;
  int sharing = 1;
  while (sharing < 32 && sharing < vectors) sharing *= 2;
  const int mine = lane % sharing, stride = kDecodeThreads / sharing;
  // The loop bounds are those of the warp: all its lanes take part in the shuffles.
  for (int j0 = warp * (32 / sharing); j0 < keys; j0 += kAhead * stride) {
    float dot[kAhead][kRows] = {};
    for (int i = mine; i < vectors; i += sharing) {
      V held[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int j = j0 + u * stride + lane / sharing;
        held[u] = {};
        if (j < keys) held[u] = reinterpret_cast<const V*>(k + j * a.k_stride)[i];
      }
#pragma unroll
      for (int e = 0; e < kPer; e += kQuad) {
        float x[kAhead][kQuad];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          T part[kPer];
          memcpy(part, &held[u], sizeof(V));
#pragma unroll
          for (int n = 0; n < kQuad; ++n) x[u][n] = to_float(part[e + n]);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float* q = q_tile + r * kMaxDim + q_slot<kPer>(i * kPer + e);
          float y[kQuad];
          if constexpr (kQuad == 4) {
            load4(q, y);
          } else {
            y[0] = q[0];
          }
#pragma unroll
          for (int u = 0; u < kAhead; ++u)
#pragma unroll
            for (int n = 0; n < kQuad; ++n) dot[u][r] += x[u][n] * y[n];
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      for (int step = 1; step < sharing; step *= 2)
#pragma unroll
        for (int r = 0; r < kRows; ++r) dot[u][r] += __shfl_xor_sync(0xFFFFFFFFu, dot[u][r], step);
      const int j = j0 + u * stride + lane / sharing;
      if (mine == 0 && j < keys)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          weights[j * kRows + r] = j < visible[r] ? dot[u][r] : bits_to_float(0xFF800000u);
    }
  }
}

// Logits to weights 2^(logit - max), in place; max and sum of each row. Thread t has row t % kRows.
template <int kRows>
__device__ inline void chunk_softmax(int keys, float* weights, float* by_warp, float* row_max,
                                     float* row_sum) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r = threadIdx.x % kRows, first = static_cast<int>(threadIdx.x) / kRows;
  constexpr int kStep = kDecodeThreads / kRows;
  float top = kNoLogit, sum = 0.0f;
  for (int j = first; j < keys; j += kStep) top = larger_or_nan(top, weights[j * kRows + r]);
  for (int step = kRows; step < 32; step *= 2)
    top = larger_or_nan(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
  if (lane < kRows) by_warp[warp * kRows + r] = top;
  __syncthreads();
  for (int w = 0; w < kDecodeWarps; ++w) top = larger_or_nan(top, by_warp[w * kRows + r]);
  __syncthreads();
  for (int j = first; j < keys; j += kStep) {
    const float e = exp2f(weights[j * kRows + r] - top);
    weights[j * kRows + r] = e;
    sum += e;
  }
  for (int step = kRows; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (lane < kRows) by_warp[warp * kRows + r] = sum;
  __syncthreads();
  if (threadIdx.x < kRows) {
    sum = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) sum += by_warp[w * kRows + r];
    row_max[r] = top;
    row_sum[r] = sum;
  }
  __syncthreads();
}

// acc[r] = sum over keys of weight * v for one value dim. Keys from `seen_by_all` on are hidden
// from some row: whatever v holds there must not reach it.
template <class T, int kRows>
__device__ inline void chunk_values(const T* v, int64_t stride, int keys, int seen_by_all,
                                    const float* weights, float (&acc)[kRows]) {
  const auto add = [&](int j, bool check) {
    const float x = to_float(v[j * stride]);
    float w[kRows];
    if constexpr (kRows % 4 == 0) {
      for (int r = 0; r < kRows; r += 4) load4(weights + j * kRows + r, w + r);
    } else {
      for (int r = 0; r < kRows; ++r) w[r] = weights[j * kRows + r];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (!check || w[r] != 0.0f) acc[r] += w[r] * x;
  };
#pragma unroll 8
  for (int j = 0; j < seen_by_all; ++j) add(j, false);
  for (int j = seen_by_all; j < keys; ++j) add(j, true);
}

template <class T, int kRows>
__global__ void __launch_bounds__(kDecodeThreads, 5) ragged_decode_kernel(DecodeArgs a) {
  TENFOLD_SHARED(float, q_tile, kRows* kMaxDim);
  TENFOLD_SHARED(float, weights, kChunkKeys* kRows);
  TENFOLD_SHARED(float, by_warp, kDecodeWarps* kRows);
  TENFOLD_SHARED(float, row_max, kRows);
  TENFOLD_SHARED(float, row_sum, kRows);
  TENFOLD_SHARED(int, visible, kRows);
  constexpr int kVectorDims = 16 / static_cast<int>(sizeof(T));
  const int64_t segment = segment_of(a, blockIdx.x);
  if (segment < 0) return;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) - first_chunk(a, segment);
  const SegmentRange s = segment_range(a, segment);
  const int64_t first = chunk * kChunkKeys, left = s.length - first;
  if (left <= 0) return;
  const int keys = left < kChunkKeys ? static_cast<int>(left) : kChunkKeys;
  const int rows = static_cast<int>(a.group * a.num_queries), dims = static_cast<int>(a.head_dim);
  const int64_t b = segment / a.kv_heads, head0 = segment % a.kv_heads * a.group;
  const T* k = static_cast<const T*>(a.k) + (s.begin + first) * a.k_stride;
  const T* v = static_cast<const T*>(a.v) + (s.begin + first) * a.v_stride;
  const int queries = static_cast<int>(a.num_queries);
  for (int r0 = 0; r0 < rows; r0 += kRows) {
    const int n = rows - r0 < kRows ? rows - r0 : kRows;
    for (int i = threadIdx.x; i < kRows * dims; i += kDecodeThreads) {
      const int r = i / dims, d = i % dims, row = r0 + r;
      float x = 0.0f;
      if (r < n)
        x = to_float(static_cast<const T*>(
                a.q)[b * a.q_stride[0] + (head0 + row / queries) * a.q_stride[1] +
                     row % queries * a.q_stride[2] + d * a.q_stride[3]]) *
            (a.scale * 1.4426950408889634f);
      q_tile[r * kMaxDim + (a.k_vectors ? q_slot<kVectorDims>(d) : d)] = x;
    }
    if (threadIdx.x < kRows) {  // of the chunk's keys; rows that do not exist hide nothing
      const int64_t later = queries - 1 - (r0 + static_cast<int>(threadIdx.x)) % queries;
      const int64_t sees = static_cast<int>(threadIdx.x) < n ? left - later : keys;
      visible[threadIdx.x] = sees < 0 ? 0 : sees > keys ? keys : static_cast<int>(sees);
    }
    __syncthreads();
    if (a.k_vectors) {
      chunk_logits<T, uint4, kRows>(a, k, keys, q_tile, visible, weights);
    } else {
      chunk_logits<T, T, kRows>(a, k, keys, q_tile, visible, weights);
    }
    __syncthreads();
    chunk_softmax<kRows>(keys, weights, by_warp, row_max, row_sum);
    int seen_by_all = keys;
    for (int r = 0; r < kRows; ++r)
      seen_by_all = visible[r] < seen_by_all ? visible[r] : seen_by_all;
    const int64_t step = 2 + a.value_dim;
    float* out = a.partial + (static_cast<int64_t>(blockIdx.x) * rows + r0) * step;
    for (int64_t d = threadIdx.x; d < a.value_dim; d += kDecodeThreads) {
      float acc[kRows] = {};
      chunk_values<T, kRows>(v + d, a.v_stride, keys, seen_by_all, weights, acc);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (r < n) out[r * step + 2 + d] = acc[r];
    }
    if (static_cast<int>(threadIdx.x) < n) {
      out[threadIdx.x * step] = row_max[threadIdx.x];
      out[threadIdx.x * step + 1] = row_sum[threadIdx.x];
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kDecodeThreads) decode_combine_kernel(DecodeArgs a) {
  const int64_t rows = a.group * a.num_queries;
  const int64_t segment = blockIdx.x / rows, r = blockIdx.x % rows;
  const SegmentRange s = segment_range(a, segment);
  const int64_t chunks = (s.length + kChunkKeys - 1) / kChunkKeys, step = 2 + a.value_dim;
  const auto part = [&](int64_t i) {
    return a.partial + ((first_chunk(a, segment) + i) * rows + r) * step;
  };
  float top = kNoLogit, sum = 0.0f;
  for (int64_t i = 0; i < chunks; ++i) {
    const float x = part(i)[0];
    top = x > top || x != x ? x : top;
  }
  for (int64_t i = 0; i < chunks; ++i) sum += part(i)[1] * exp2f(part(i)[0] - top);
  const bool sees = sum != 0.0f;  // NaN sums see something
  const int64_t at = segment * rows + r;
  for (int64_t d = threadIdx.x; d < a.value_dim; d += kDecodeThreads) {
    float acc = 0.0f;
    for (int64_t i = 0; i < chunks; ++i) acc += part(i)[2 + d] * exp2f(part(i)[0] - top);
    from_float(sees ? acc / sum : 0.0f, static_cast<T*>(a.out) + at * a.value_dim + d);
  }
  if (threadIdx.x == 0)
    a.lse[at] = sees ? top * 0.6931471805599453f + logf(sum) : bits_to_float(0xFF800000u);
}

// Whether rows of k can be read as 16-byte vectors; call it when pointer and stride are known.
inline bool key_vectors(const DecodeArgs& a, int64_t element_size) {
  return (reinterpret_cast<uintptr_t>(a.k) |
          static_cast<uintptr_t>((a.head_dim | a.k_stride) * element_size)) %
             16 ==
         0;
}

template <class T>
void launch_ragged_decode(const DecodeArgs& a, cudaStream_t stream) {
  const int64_t rows = a.group * a.num_queries, segments = a.batch * a.kv_heads;
  if (segments * rows == 0) return;
  const auto chunks = static_cast<unsigned>(chunk_slots(a));
  if (rows == 1) {
    TENFOLD_LAUNCH((ragged_decode_kernel<T, 1>), chunks, kDecodeThreads, stream, a);
  } else if (rows <= 4) {
    TENFOLD_LAUNCH((ragged_decode_kernel<T, 4>), chunks, kDecodeThreads, stream, a);
  } else {
    TENFOLD_LAUNCH((ragged_decode_kernel<T, 8>), chunks, kDecodeThreads, stream, a);
  }
  TENFOLD_LAUNCH(decode_combine_kernel<T>, static_cast<unsigned>(segments * rows), kDecodeThreads,
                 stream, a);
}

}  // namespace tenfold::cuda
