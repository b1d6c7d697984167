// SPDX-License-Identifier: Apache-2.0
// Device code of fuse_heads, its backward and collapse_heads. A thread owns 16 bytes of columns (or
// one) of a dim and forms up to kMixOutputs outputs of its group from one load of every input row;
// more outputs take more blocks, which find the rows in L2.
//   Backward: a block owns a tile of domega for one dim and walks over all columns, so that sums
//   need no atomics. If the tile is the whole group, the rows of dout are in registers and dw is
//   formed from them too: both gradients in one pass. Larger groups get dw from the mixing kernel.
#pragma once

#include "core/convert.cuh"

namespace tenfold::cuda {

// Rows (head, dim) of [H, d, m] through `groups`, or of [N, g, d, m]. Strides in elements.
struct HeadRows {
  void* data;
  int64_t group_stride, head_stride, dim_stride;
  bool by_groups;
};

struct MixArgs {
  HeadRows from, to;
  IntArray groups;  // [N, g], contiguous
  int64_t num_groups, num_in, num_out, dims, length, heads;
  const float* omega;         // [N, g, g, d]
  int64_t coef_in, coef_out;  // strides of omega over inputs and outputs, elements
  int64_t mean_heads;         // > 0: the coefficient is the mean over so many heads h
  bool vectors;               // all rows are whole, aligned 16-byte vectors
};

struct FuseBackwardArgs {
  HeadRows dout, w, dw;  // dw.data null: not wanted here
  IntArray groups;
  int64_t num_groups, size, dims, length, heads;
  const float* omega;
  float* domega;  // [N, g, g, d]
  bool vectors;
};

constexpr int kMixThreads = 128, kMixOutputs = 8, kCoefChunk = 64;
constexpr int kDotThreads = 128, kDotWarps = kDotThreads / 32;

// 8 bytes in one load: as much of 16-bit rows as the registers of a tile of 8 heads can take.
struct alignas(8) Words2 {
  uint32_t x, y;
};

// Null if the head does not exist: such a row counts as zeros and is not written.
template <class T>
__device__ inline T* head_row(const HeadRows& r, const IntArray& groups, int64_t heads, int64_t n,
                              int64_t size, int64_t h, int64_t i) {
  T* data = static_cast<T*>(r.data) + i * r.dim_stride;
  if (!r.by_groups) return data + n * r.group_stride + h * r.head_stride;
  const int64_t head = groups[n * size + h];
  return head >= 0 && head < heads ? data + head * r.head_stride : nullptr;
}

template <bool kNarrow>
struct ChooseVector {
  using Type = uint4;
};
template <>
struct ChooseVector<true> {
  using Type = Words2;
};

// V: uint4, Words2 or T, what a thread holds of a row.
template <class T, class V>
struct Columns {
  static constexpr int kCount = static_cast<int>(sizeof(V) / sizeof(T));
  __device__ static void load(const T* row, int64_t at, float (&x)[kCount]) {
    V held{};
    if (row != nullptr) held = reinterpret_cast<const V*>(row)[at];
    T part[kCount];
    memcpy(part, &held, sizeof(V));
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = to_float(part[e]);
  }
  __device__ static void store(T* row, int64_t at, const float (&x)[kCount]) {
    if (row == nullptr) return;
    T part[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) from_float(x[e], part + e);
    V held;
    memcpy(&held, part, sizeof(V));
    reinterpret_cast<V*>(row)[at] = held;
  }
};

__device__ inline float coefficient(const MixArgs& a, int64_t n, int64_t in, int64_t out,
                                    int64_t i) {
  const int64_t size = a.num_in;
  const float* at = a.omega + n * size * size * a.dims + in * a.coef_in + out * a.coef_out + i;
  if (a.mean_heads == 0) return *at;
  float sum = 0.0f;
  for (int64_t h = 0; h < a.mean_heads; ++h) sum += at[h * size * a.dims];
  return sum / static_cast<float>(a.mean_heads);
}

template <class T, class V>
__global__ void __launch_bounds__(kMixThreads) mix_heads_kernel(MixArgs a) {
  constexpr int kCount = Columns<T, V>::kCount;
  TENFOLD_SHARED(float, coef, kCoefChunk* kMixOutputs);
  const int64_t columns = a.length / kCount;
  const int64_t tiles = (columns + kMixThreads - 1) / kMixThreads;
  const int64_t parts = (a.num_out + kMixOutputs - 1) / kMixOutputs;
  int64_t at = blockIdx.x;
  const int64_t part = at % parts;  // parts of one tile run side by side: they share the rows in L2
  at /= parts;
  const int64_t column = at % tiles * kMixThreads + threadIdx.x;
  at /= tiles;
  const int64_t i = at % a.dims, n = at / a.dims, first = part * kMixOutputs;
  const bool idle = column >= columns;  // stays for the barriers
  float sum[kMixOutputs][kCount] = {};
  for (int64_t in0 = 0; in0 < a.num_in; in0 += kCoefChunk) {
    const int chunk = static_cast<int>(a.num_in - in0 < kCoefChunk ? a.num_in - in0 : kCoefChunk);
    __syncthreads();
    for (int e = threadIdx.x; e < chunk * kMixOutputs; e += kMixThreads) {
      const int64_t out = first + e % kMixOutputs;
      coef[e] = out < a.num_out ? coefficient(a, n, in0 + e / kMixOutputs, out, i) : 0.0f;
    }
    __syncthreads();
    for (int in = 0; in < chunk && !idle; ++in) {
      const T* row = head_row<T>(a.from, a.groups, a.heads, n, a.num_in, in0 + in, i);
      float x[kCount];
      Columns<T, V>::load(row, column, x);
#pragma unroll
      for (int o = 0; o < kMixOutputs; ++o)
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum[o][e] += coef[in * kMixOutputs + o] * x[e];
    }
  }
  if (idle) return;
#pragma unroll
  for (int o = 0; o < kMixOutputs; ++o)
    if (first + o < a.num_out)
      Columns<T, V>::store(head_row<T>(a.to, a.groups, a.heads, n, a.num_in, first + o, i), column,
                           sum[o]);
}

// Sums of the block's threads, one after another: to[at] for at < kValues.
template <int kValues>
__device__ inline void block_sums(float (&values)[kValues], float* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int at = 0; at < kValues; ++at)
    for (int step = 16; step > 0; step /= 2)
      values[at] += __shfl_xor_sync(0xFFFFFFFFu, values[at], step);
  if (lane == 0)
    for (int at = 0; at < kValues; ++at) warp_sums[warp * kValues + at] = values[at];
  __syncthreads();
}

template <class T, class V, int kTile>
__global__ void __launch_bounds__(kDotThreads) fuse_backward_kernel(FuseBackwardArgs a) {
  constexpr int kCount = Columns<T, V>::kCount;
  TENFOLD_SHARED(float, coef, kTile* kTile);
  TENFOLD_SHARED(float, warp_sums, kDotWarps * kTile * kTile);
  const int64_t tiles = (a.size + kTile - 1) / kTile;
  int64_t at = blockIdx.x;
  const int64_t j0 = at % tiles * kTile;
  at /= tiles;
  const int64_t h0 = at % tiles * kTile;
  at /= tiles;
  const int64_t i = at % a.dims, n = at / a.dims, pairs = a.size * a.size;
  const bool mixes = a.dw.data != nullptr;  // then the tile is the whole group
  for (int e = threadIdx.x; e < kTile * kTile; e += kDotThreads) {
    const int64_t h = h0 + e / kTile, j = j0 + e % kTile;
    const bool inside = h < a.size && j < a.size;
    coef[e] = mixes && inside ? a.omega[(n * pairs + h * a.size + j) * a.dims + i] : 0.0f;
  }
  __syncthreads();
  float sums[kTile * kTile] = {};
#pragma unroll 1
  for (int64_t column = threadIdx.x; column < a.length / kCount; column += kDotThreads) {
    asm volatile("" ::: "memory");  // else coef moves into registers, of which there are not enough
    float grad[kTile][kCount];
#pragma unroll
    for (int h = 0; h < kTile; ++h)
      Columns<T, V>::load(
          h0 + h < a.size ? head_row<T>(a.dout, a.groups, a.heads, n, a.size, h0 + h, i) : nullptr,
          column, grad[h]);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      if (j0 + j >= a.size) continue;
      float weight[kCount], mixed[kCount] = {};
      Columns<T, V>::load(head_row<T>(a.w, a.groups, a.heads, n, a.size, j0 + j, i), column,
                          weight);
#pragma unroll
      for (int h = 0; h < kTile; ++h)
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          sums[h * kTile + j] += grad[h][e] * weight[e];
          mixed[e] += coef[h * kTile + j] * grad[h][e];
        }
      if (mixes)
        Columns<T, V>::store(head_row<T>(a.dw, a.groups, a.heads, n, a.size, j0 + j, i), column,
                             mixed);
    }
  }
  block_sums<kTile * kTile>(sums, warp_sums);
  for (int e = threadIdx.x; e < kTile * kTile; e += kDotThreads) {
    const int64_t h = h0 + e / kTile, j = j0 + e % kTile;
    if (h >= a.size || j >= a.size) continue;
    float total = 0.0f;
    for (int warp = 0; warp < kDotWarps; ++warp) total += warp_sums[warp * kTile * kTile + e];
    a.domega[(n * pairs + h * a.size + j) * a.dims + i] = total;
  }
}

// Rows are 16-byte vectors: base, strides and length.
inline bool aligned_rows(const HeadRows& r, int64_t length, int64_t size) {
  const auto base = static_cast<int64_t>(reinterpret_cast<uintptr_t>(r.data));
  const int64_t strides = r.group_stride | r.head_stride | r.dim_stride | length;
  return base % 16 == 0 && strides * size % 16 == 0;
}

template <class T>
int64_t mix_blocks(const MixArgs& a) {
  const int64_t count = a.vectors ? 16 / static_cast<int64_t>(sizeof(T)) : 1;
  const int64_t tiles = (a.length / count + kMixThreads - 1) / kMixThreads;
  return a.num_groups * a.dims * tiles * ((a.num_out + kMixOutputs - 1) / kMixOutputs);
}

template <class T>
void launch_mix_heads(const MixArgs& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(mix_blocks<T>(a));
  if (blocks == 0) return;
  if (a.vectors) {
    TENFOLD_LAUNCH((mix_heads_kernel<T, uint4>), blocks, kMixThreads, stream, a);
  } else {
    TENFOLD_LAUNCH((mix_heads_kernel<T, T>), blocks, kMixThreads, stream, a);
  }
}

constexpr int64_t kWholeGroup = 8;  // groups up to this size get both gradients in one pass

inline int64_t backward_tile(int64_t size) {
  return size <= 4 ? 4 : 8;
}

inline int64_t backward_blocks(const FuseBackwardArgs& a) {
  const int64_t tile = backward_tile(a.size), tiles = (a.size + tile - 1) / tile;
  return a.num_groups * a.dims * tiles * tiles;
}

template <class T, int kTile>
void launch_backward_tile(const FuseBackwardArgs& a, unsigned blocks, cudaStream_t stream) {
  constexpr bool kNarrow = kTile == 8 && sizeof(T) == 2;
  using Vector = typename ChooseVector<kNarrow>::Type;
  if (a.vectors) {
    TENFOLD_LAUNCH((fuse_backward_kernel<T, Vector, kTile>), blocks, kDotThreads, stream, a);
  } else {
    TENFOLD_LAUNCH((fuse_backward_kernel<T, T, kTile>), blocks, kDotThreads, stream, a);
  }
}

template <class T>
void launch_fuse_backward(const FuseBackwardArgs& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(backward_blocks(a));
  if (blocks == 0) return;
  if (backward_tile(a.size) == 4) {
    launch_backward_tile<T, 4>(a, blocks, stream);
  } else {
    launch_backward_tile<T, 8>(a, blocks, stream);
  }
}

}  // namespace tenfold::cuda
