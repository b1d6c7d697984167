// Device code of ragged_decode: one block per (segment, chunk of keys), all query rows of the head
// share what it loads. Per group of kRowGroup rows: logits (a warp per key, lanes along D), softmax
// weights of the chunk in shared memory, then values (a thread per value dim). A second kernel
// combines the chunks of each row in order.
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
};

constexpr int kDecodeThreads = 128, kChunkKeys = 256, kRowGroup = 8;
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

template <class T>
__global__ void __launch_bounds__(kDecodeThreads) ragged_decode_kernel(DecodeArgs a) {
  TENFOLD_SHARED(float, q_tile, kRowGroup* kMaxDim);
  TENFOLD_SHARED(float, weights, kRowGroup* kChunkKeys);
  TENFOLD_SHARED(float, row_max, kRowGroup);
  TENFOLD_SHARED(float, row_sum, kRowGroup);
  const int64_t segment = segment_of(a, blockIdx.x);
  if (segment < 0) return;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) - first_chunk(a, segment);
  const SegmentRange s = segment_range(a, segment);
  const int64_t first = chunk * kChunkKeys;
  const int64_t keys = s.length - first < kChunkKeys ? s.length - first : kChunkKeys;
  if (keys <= 0) return;
  const int64_t rows = a.group * a.num_queries, b = segment / a.kv_heads;
  const int64_t head0 = segment % a.kv_heads * a.group;
  const T* k = static_cast<const T*>(a.k) + (s.begin + first) * a.k_stride;
  const T* v = static_cast<const T*>(a.v) + (s.begin + first) * a.v_stride;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t r0 = 0; r0 < rows; r0 += kRowGroup) {
    const int n = static_cast<int>(rows - r0 < kRowGroup ? rows - r0 : kRowGroup);
    for (int64_t i = threadIdx.x; i < n * a.head_dim; i += kDecodeThreads) {
      const int64_t r = r0 + i / a.head_dim, d = i % a.head_dim;
      const T* q = static_cast<const T*>(a.q) + b * a.q_stride[0] +
                   (head0 + r / a.num_queries) * a.q_stride[1] + r % a.num_queries * a.q_stride[2] +
                   d * a.q_stride[3];
      q_tile[(r - r0) * kMaxDim + d] = to_float(*q) * (a.scale * 1.4426950408889634f);
    }
    __syncthreads();
    for (int64_t j = warp; j < keys; j += kDecodeThreads / 32) {
      float dot[kRowGroup] = {};
      for (int64_t d = lane; d < a.head_dim; d += 32) {
        const float x = to_float(k[j * a.k_stride + d]);
#pragma unroll
        for (int r = 0; r < kRowGroup; ++r)
          if (r < n) dot[r] += x * q_tile[r * kMaxDim + d];
      }
#pragma unroll
      for (int r = 0; r < kRowGroup; ++r) {
        for (int step = 1; step < 32; step *= 2)
          dot[r] += __shfl_xor_sync(0xFFFFFFFFu, dot[r], step);
        const int64_t query = (r0 + r) % a.num_queries;
        const int64_t visible = s.length - (a.num_queries - 1 - query) - first;
        if (lane == 0 && r < n)
          weights[r * kChunkKeys + j] = j < visible ? dot[r] : bits_to_float(0xFF800000u);
      }
    }
    __syncthreads();
    for (int r = warp; r < n; r += kDecodeThreads / 32) {
      float top = kNoLogit, sum = 0.0f;
      for (int64_t j = lane; j < keys; j += 32) {
        const float x = weights[r * kChunkKeys + j];
        top = x > top || x != x ? x : top;
      }
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, top, step);
        top = other > top || other != other ? other : top;
      }
      for (int64_t j = lane; j < keys; j += 32) {
        const float e = exp2f(weights[r * kChunkKeys + j] - top);
        weights[r * kChunkKeys + j] = e;
        sum += e;
      }
      for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      if (lane == 0) {
        row_max[r] = top;
        row_sum[r] = sum;
      }
    }
    __syncthreads();
    float* out = a.partial + (static_cast<int64_t>(blockIdx.x) * rows + r0) * (2 + a.value_dim);
    for (int64_t d = threadIdx.x; d < a.value_dim; d += kDecodeThreads) {
      float acc[kRowGroup] = {};
      for (int64_t j = 0; j < keys; ++j) {
        const float x = to_float(v[j * a.v_stride + d]);
#pragma unroll
        for (int r = 0; r < kRowGroup; ++r)
          if (r < n && weights[r * kChunkKeys + j] != 0.0f)
            acc[r] += weights[r * kChunkKeys + j] * x;
      }
      for (int r = 0; r < n; ++r) out[r * (2 + a.value_dim) + 2 + d] = acc[r];
    }
    if (threadIdx.x < n) {
      out[threadIdx.x * (2 + a.value_dim)] = row_max[threadIdx.x];
      out[threadIdx.x * (2 + a.value_dim) + 1] = row_sum[threadIdx.x];
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

template <class T>
void launch_ragged_decode(const DecodeArgs& a, cudaStream_t stream) {
  const int64_t rows = a.group * a.num_queries, segments = a.batch * a.kv_heads;
  if (segments * rows == 0) return;
  TENFOLD_LAUNCH(ragged_decode_kernel<T>, static_cast<unsigned>(chunk_slots(a)), kDecodeThreads,
                 stream, a);
  TENFOLD_LAUNCH(decode_combine_kernel<T>, static_cast<unsigned>(segments * rows), kDecodeThreads,
                 stream, a);
}

}  // namespace tenfold::cuda
