// SPDX-License-Identifier: Apache-2.0
// Device code of moe_permute, moe_combine and their backward. A team of threads, of a size that
// depends on d alone, has a row, 16 bytes (and 8 elements where it sums) of a thread at a time.
// Sums go over a token's slots in order; every row has one owner: no atomics on numbers.
#pragma once

#include "core/vectors.cuh"

namespace tenfold::cuda {

constexpr int kTeamThreads = 256, kTeamPer = 8;

// Threads of a row of `columns` loads: half of them at least have one.
inline int team_size(int64_t columns) {
  int size = 32;
  while (size < kTeamThreads && size < columns) size *= 2;
  return size;
}

inline int64_t team_blocks(int64_t rows, int team) {
  const int64_t each = kTeamThreads / team;
  return (rows + each - 1) / each;
}

struct Team {
  int64_t row;  // of the grid
  int thread, size;

  __device__ explicit Team(int size) : size(size) {
    thread = static_cast<int>(threadIdx.x) % size;
    row = static_cast<int64_t>(blockIdx.x) * (kTeamThreads / size) +
          static_cast<int>(threadIdx.x) / size;
  }
};

struct PermuteArgs {
  const void* x;
  int64_t stride, bytes;  // of a row
  IntArray order;
  int64_t positions, slots, k;
  void* y;  // [positions] rows without gaps
};

// V: what a thread moves at a time.
template <class V>
__global__ void __launch_bounds__(kTeamThreads) permute_kernel(PermuteArgs a, int team) {
  const Team at(team);
  if (at.row >= a.positions) return;
  const int64_t q = a.order[at.row], columns = a.bytes / static_cast<int64_t>(sizeof(V));
  auto* const to = reinterpret_cast<V*>(static_cast<char*>(a.y) + at.row * a.bytes);
  if (q < 0 || q >= a.slots) {
    for (int64_t c = at.thread; c < columns; c += at.size) to[c] = V{};
    return;
  }
  // Both are below 2^31.
  const uint32_t t = static_cast<uint32_t>(q) / static_cast<uint32_t>(a.k);
  const auto* const from = reinterpret_cast<const V*>(static_cast<const char*>(a.x) + t * a.stride);
#pragma unroll 4
  for (int64_t c = at.thread; c < columns; c += at.size) to[c] = from[c];
}

template <class T>
void launch_permute(const PermuteArgs& a, cudaStream_t stream) {
  if (a.positions == 0 || a.bytes == 0) return;
  const bool wide =
      reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.stride % 16 == 0 && a.bytes % 16 == 0;
  const int64_t size = wide ? 16 : static_cast<int64_t>(sizeof(T));
  const int team = team_size(a.bytes / size);
  const auto blocks = static_cast<unsigned>(team_blocks(a.positions, team));
  if (wide) {
    TENFOLD_LAUNCH(permute_kernel<uint4>, blocks, kTeamThreads, stream, a, team);
  } else {
    TENFOLD_LAUNCH(permute_kernel<T>, blocks, kTeamThreads, stream, a, team);
  }
}

// Where the values of `from` in [0, n) stand in it, -1 where they do not. Of one that stands twice,
// which must not be, the last place.
struct InvertArgs {
  IntArray from;
  int64_t count, n;
  int32_t* at;  // [n]
};

constexpr int kInvertThreads = 1024;

static __global__ void __launch_bounds__(kInvertThreads) invert_clear_kernel(InvertArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kInvertThreads + threadIdx.x;
  if (i < a.n) a.at[i] = -1;
}

static __global__ void __launch_bounds__(kInvertThreads) invert_kernel(InvertArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kInvertThreads + threadIdx.x;
  if (i >= a.count) return;
  const int64_t x = a.from[i];
  if (x >= 0 && x < a.n) atomicMax(a.at + x, static_cast<int32_t>(i));
}

inline void launch_invert(const InvertArgs& a, cudaStream_t stream) {
  const auto blocks = [](int64_t n) {
    return static_cast<unsigned>((n + kInvertThreads - 1) / kInvertThreads);
  };
  if (a.n == 0) return;
  TENFOLD_LAUNCH(invert_clear_kernel, blocks(a.n), kInvertThreads, stream, a);
  if (a.count > 0) TENFOLD_LAUNCH(invert_kernel, blocks(a.count), kInvertThreads, stream, a);
}

struct CombineArgs {
  const void* y;
  int64_t stride, rows, dim;
  bool wide;
  const float* weight;  // [tokens, k]; null: 1
  IntArray inverse;     // [tokens k]; outside of [0, rows): left out
  int64_t tokens, k;
  void* out;  // [tokens, dim]
};

template <class T>
CombineArgs with_shape(CombineArgs a) {
  a.wide = wide_rows<T, kTeamPer>(a.y, a.stride, a.dim);
  return a;
}

template <class T>
__global__ void __launch_bounds__(kTeamThreads) combine_kernel(CombineArgs a, int team) {
  const Team at(team);
  if (at.row >= a.tokens) return;
  T* const out = static_cast<T*>(a.out) + at.row * a.dim;
  for (int64_t c = at.thread * kTeamPer; c < a.dim; c += at.size * kTeamPer) {
    float sum[kTeamPer] = {};
#pragma unroll 2
    for (int64_t q = at.row * a.k; q < at.row * a.k + a.k; ++q) {
      const int64_t p = a.inverse[q];
      if (p < 0 || p >= a.rows) continue;
      const float w = a.weight != nullptr ? a.weight[q] : 1.0f;
      float x[kTeamPer];
      load_some(static_cast<const T*>(a.y) + p * a.stride + c, a.dim - c, a.wide, x);
#pragma unroll
      for (int i = 0; i < kTeamPer; ++i) sum[i] = fmaf(w, x[i], sum[i]);
    }
    store_some(sum, out + c, a.dim - c, a.dim % kTeamPer == 0);
  }
}

template <class T>
void launch_combine(const CombineArgs& a, cudaStream_t stream) {  // of with_shape
  if (a.tokens == 0 || a.dim == 0) return;
  const int team = team_size((a.dim + kTeamPer - 1) / kTeamPer);
  TENFOLD_LAUNCH(combine_kernel<T>, static_cast<unsigned>(team_blocks(a.tokens, team)),
                 kTeamThreads, stream, a, team);
}

struct CombineGradArgs {
  const void *grad, *y;
  int64_t grad_stride, stride, rows, dim;
  bool grad_wide, wide;
  const float* weight;
  IntArray inverse;
  int64_t tokens, k;
  const int32_t* slot;  // [rows], of launch_invert; only for grad_y
  void* grad_y;         // [rows, dim] or null
  float* grad_weight;   // [tokens, k] or null
};

template <class T>
CombineGradArgs with_shape(CombineGradArgs a) {
  a.grad_wide = wide_rows<T, kTeamPer>(a.grad, a.grad_stride, a.dim);
  a.wide = wide_rows<T, kTeamPer>(a.y, a.stride, a.dim);
  return a;
}

// Slot q: its row of grad_y, and the thread's part of <grad, y>.
template <class T>
__device__ inline float slot_grad(const CombineGradArgs& a, const Team& at, int64_t t, int64_t q,
                                  int64_t p) {
  // Of slots with one position, which must not be, one writes.
  const bool writes = a.grad_y != nullptr && a.slot[p] == q;
  const float w = a.weight[q];
  const T* const grad = static_cast<const T*>(a.grad) + t * a.grad_stride;
  const T* const y = static_cast<const T*>(a.y) + p * a.stride;
  T* const out = static_cast<T*>(a.grad_y) + p * a.dim;
  float dot = 0.0f;
  for (int64_t c = at.thread * kTeamPer; c < a.dim; c += at.size * kTeamPer) {
    const int64_t left = a.dim - c;
    float g[kTeamPer], x[kTeamPer];
    load_some(grad + c, left, a.grad_wide, g);
    if (a.grad_weight != nullptr) {
      load_some(y + c, left, a.wide, x);
      float part[2] = {};
#pragma unroll
      for (int i = 0; i < kTeamPer; ++i) part[i % 2] = fmaf(g[i], x[i], part[i % 2]);
      dot += part[0] + part[1];
    }
    if (!writes) continue;
#pragma unroll
    for (int i = 0; i < kTeamPer; ++i) g[i] *= w;
    store_some(g, out + c, left, a.dim % kTeamPer == 0);
  }
  return dot;
}

// Blocks from `token_blocks` on clear the rows of grad_y that no slot has.
template <class T>
__global__ void __launch_bounds__(kTeamThreads)
    combine_grad_kernel(CombineGradArgs a, int team, int64_t token_blocks) {
  constexpr int kTogether = 8;  // slots between barriers
  TENFOLD_SHARED(float, dots, kTogether*(kTeamThreads / 32));
  Team at(team);
  if (static_cast<int64_t>(blockIdx.x) >= token_blocks) {
    at.row -= token_blocks * (kTeamThreads / team);
    if (at.row >= a.rows || a.slot[at.row] >= 0) return;
    T* const out = static_cast<T*>(a.grad_y) + at.row * a.dim;
    const float none[kTeamPer] = {};
    for (int64_t c = at.thread * kTeamPer; c < a.dim; c += at.size * kTeamPer)
      store_some(none, out + c, a.dim - c, a.dim % kTeamPer == 0);
    return;
  }
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = team / 32;
  const int64_t t = at.row < a.tokens ? at.row : 0;
  for (int64_t first = 0; first < a.k; first += kTogether) {
    const int some = static_cast<int>(a.k - first < kTogether ? a.k - first : kTogether);
    for (int j = 0; j < some; ++j) {
      const int64_t q = t * a.k + first + j, p = a.inverse[q];
      float dot = 0.0f;
      if (at.row < a.tokens && p >= 0 && p < a.rows) dot = slot_grad<T>(a, at, t, q, p);
      if (a.grad_weight == nullptr) continue;
      for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(0xFFFFFFFFu, dot, step);
      if (threadIdx.x % 32 == 0) dots[j * (kTeamThreads / 32) + warp] = dot;
    }
    if (a.grad_weight == nullptr) continue;
    __syncthreads();
    if (at.row < a.tokens && at.thread < some) {
      const float* const mine = dots + at.thread * (kTeamThreads / 32) + warp / warps * warps;
      float total = mine[0];
      for (int w = 1; w < warps; ++w) total += mine[w];
      a.grad_weight[t * a.k + first + at.thread] = total;
    }
    __syncthreads();
  }
}

inline int64_t combine_grad_blocks(const CombineGradArgs& a, int team) {
  return team_blocks(a.tokens, team) + (a.grad_y != nullptr ? team_blocks(a.rows, team) : 0);
}

inline int combine_grad_team(const CombineGradArgs& a) {
  return team_size((a.dim + kTeamPer - 1) / kTeamPer);
}

template <class T>
void launch_combine_grad(const CombineGradArgs& a, cudaStream_t stream) {  // of with_shape
  const int team = combine_grad_team(a);
  const int64_t blocks = combine_grad_blocks(a, team);
  if (blocks > 0)
    TENFOLD_LAUNCH(combine_grad_kernel<T>, static_cast<unsigned>(blocks), kTeamThreads, stream, a,
                   team, team_blocks(a.tokens, team));
}

}  // namespace tenfold::cuda
