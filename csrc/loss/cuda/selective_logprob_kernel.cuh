// SPDX-License-Identifier: Apache-2.0
// Device code of the rows of selective_logprob and of sequence_nll. Forward: a block holds a chunk
// of a row in registers, finds its maximum and then its sums relative to it; a warp joins a row's
// chunks. Chunks and the elements of a thread depend on the vocabulary only: a row gives the same
// bits in any batch, at any alignment. Backward: a block writes a part of a row, in vectors as the
// output is aligned.
#pragma once

#include "loss/cuda/row_vectors.cuh"
#include "loss/cuda/softmax.cuh"

namespace tenfold::cuda {

constexpr int kLogitThreads = 256;  // at most
// 16-byte vectors of a thread, all in flight at once: with 3 blocks on a multiprocessor 96 KB,
// several times what hides the latency of memory.
constexpr int kLogitVectors = 8, kLogitGradVectors = 4;

// Rows of logits [outer, inner, V] of any strides but the last, each with an id. A row whose id is
// `ignored` does not count: it is not read, and what it gives is 0.
struct LogitRows {
  const void* logits;
  int64_t rows, vocab, row_stride;
  IntArray ids;
  // sequence_nll only
  int64_t inner = 0, outer_stride = 0, ignored = 0;

  // Of the first element. Rows are fewer than 2^31.
  template <bool kSequences>
  __device__ int64_t at(int64_t row) const {
    if constexpr (kSequences) {
      const int64_t outer = static_cast<uint32_t>(row) / static_cast<uint32_t>(inner);
      return outer * outer_stride + (row - outer * inner) * row_stride;
    } else {
      return row * row_stride;
    }
  }
  template <bool kSequences>
  __device__ bool counts(int64_t row) const {
    return !kSequences || ids[row] != ignored;
  }
};

struct LogprobArgs : LogitRows {
  double scale;       // 1 / temperature
  int64_t chunk = 0;  // logits of a block
  int chunks = 0;     // of a row
  LogitSums* parts;   // [rows][chunks], if there are several
  float *logp, *lse, *entropy;
};

// Threads that cover n vectors, `each` by each, if they can.
inline int logit_threads(int64_t n, int each) {
  const int64_t threads = (n + each * 32 - 1) / (each * 32) * 32;
  return static_cast<int>(threads < kLogitThreads ? threads : kLogitThreads);
}

// Equal chunks of whole vectors.
template <class T>
LogprobArgs with_chunks(LogprobArgs a) {
  constexpr int64_t kPer = kPerVector<T>, kMost = kPer * kLogitVectors * kLogitThreads;
  a.chunks = static_cast<int>((a.vocab + kMost - 1) / kMost);
  a.chunk = ((a.vocab + a.chunks - 1) / a.chunks + kPer - 1) / kPer * kPer;
  return a;
}

__device__ inline float id_logit(const LogprobArgs& a, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(a.logits)[at];
  if (dtype == Dtype::bf16) return to_float(static_cast<const bf16_t*>(a.logits)[at]);
  return to_float(static_cast<const fp16_t*>(a.logits)[at]);
}

template <bool kSequences>
__device__ inline void store_logprob(const LogprobArgs& a, Dtype dtype, int64_t row,
                                     const LogitSums& all) {
  const double log_sum = all.sum > 0.0 || all.sum != all.sum ? log(all.sum) : 0.0;
  if (!kSequences || a.lse != nullptr) a.lse[row] = static_cast<float>(all.max + log_sum);
  if constexpr (!kSequences) a.entropy[row] = static_cast<float>(log_sum - all.weighted / all.sum);
  const int64_t id = a.ids[row];
  float logp = 0.0f;
  if (id >= 0 && id < a.vocab) {
    const double x = a.scale * id_logit(a, dtype, a.at<kSequences>(row) + id);
    logp = static_cast<float>(x - all.max - log_sum);
  }
  a.logp[row] = logp;
}

template <class T>
__device__ constexpr Dtype dtype_of() {
  return sizeof(T) == 4 ? Dtype::f32 : std::is_same_v<T, bf16_t> ? Dtype::bf16 : Dtype::f16;
}

// Of a row that does not count.
__device__ inline void store_nothing(const LogprobArgs& a, int64_t row) {
  if (a.lse != nullptr) a.lse[row] = 0.0f;
  a.logp[row] = 0.0f;
}

template <class T, bool kSequences>
__global__ void __launch_bounds__(kLogitThreads, 3) logit_sums_kernel(LogprobArgs a) {
  constexpr int kPer = kPerVector<T>, kWarps = kLogitThreads / 32;
  TENFOLD_SHARED(float, tops, kWarps);
  TENFOLD_SHARED(double, sums, 2 * kWarps);
  const int64_t row = blockIdx.x / static_cast<unsigned>(a.chunks);
  const int64_t begin = blockIdx.x % static_cast<unsigned>(a.chunks) * a.chunk;
  const int64_t end = begin + a.chunk < a.vocab ? begin + a.chunk : a.vocab;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (!a.counts<kSequences>(row)) {  // a row of several chunks is left to their join
    if (a.chunks == 1 && threadIdx.x == 0) store_nothing(a, row);
    return;
  }
  const RowVectors<T> vectors(static_cast<const T*>(a.logits) + a.at<kSequences>(row), end, begin);
  uint4 held[kLogitVectors];
  vectors.load(begin + threadIdx.x * kPer, blockDim.x * kPer, held);
  // Never -inf: differences stay numbers, and what is -inf weighs nothing.
  float top = kLowestFloat;
#pragma unroll
  for (int j = 0; j < kLogitVectors; ++j) {
    float x[kPer];
    to_floats<T>(held[j], x);
#pragma unroll
    for (int k = 0; k < kPer; ++k) top = fmaxf(top, x[k]);
  }
  for (int step = 16; step > 0; step /= 2)
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
  if (threadIdx.x % 32 == 0) tops[warp] = top;
  __syncthreads();
  for (int w = 0; w < warps; ++w) top = fmaxf(top, tops[w]);
  const float factor = static_cast<float>(a.scale * 1.4426950408889634);
  float sum[2] = {}, weighted[2] = {};  // weighted: times log2(e)
#pragma unroll
  for (int j = 0; j < kLogitVectors; ++j) {
    float x[kPer];
    to_floats<T>(held[j], x);
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      const float d = (x[k] - top) * factor, e = fast_exp2(d);
      sum[k % 2] += e;
      weighted[k % 2] = fmaf(fmaxf(d, kZeroExponent), e, weighted[k % 2]);
    }
  }
  sum[0] += sum[1], weighted[0] += weighted[1];
  for (int step = 16; step > 0; step /= 2) {
    sum[0] += __shfl_xor_sync(0xFFFFFFFFu, sum[0], step);
    weighted[0] += __shfl_xor_sync(0xFFFFFFFFu, weighted[0], step);
  }
  if (threadIdx.x % 32 == 0) sums[2 * warp] = sum[0], sums[2 * warp + 1] = weighted[0];
  __syncthreads();
  if (threadIdx.x != 0) return;
  LogitSums all{top * a.scale, 0.0, 0.0};
  for (int w = 0; w < warps; ++w) {
    all.sum += sums[2 * w];
    all.weighted += sums[2 * w + 1] * kLn2;
  }
  if (all.sum == 0.0) all = {-INFINITY, 0.0, 0.0};  // all of them -inf
  if (a.chunks == 1) {
    store_logprob<kSequences>(a, dtype_of<T>(), row, all);
  } else {
    a.parts[blockIdx.x] = all;
  }
}

constexpr int kJoinThreads = 128;

// A warp a row.
template <bool kSequences>
__global__ void __launch_bounds__(kJoinThreads) join_sums_kernel(LogprobArgs a, Dtype dtype) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kJoinThreads / 32) + threadIdx.x / 32;
  if (row >= a.rows) return;
  if (!a.counts<kSequences>(row)) {
    if (threadIdx.x % 32 == 0) store_nothing(a, row);
    return;
  }
  const LogitSums* const parts = a.parts + row * a.chunks;
  const LogitSums all = join_in_warp(a.chunks, [&](int i) { return parts[i]; });
  if (threadIdx.x % 32 == 0) store_logprob<kSequences>(a, dtype, row, all);
}

struct LogprobGradArgs : LogitRows {
  const float *grad_logp, *grad_lse, *grad_entropy;  // or null
  const float* grad_nll;                             // of sequences: [outer], for all of those
  const float *lse, *entropy;
  double scale;
  int blocks = 0;  // of a row
  void* out;       // [rows][vocab]
};

template <bool kSequences>
__device__ inline LogitGrad logit_grad_of(const LogprobGradArgs& a, int64_t row, int64_t id) {
  if constexpr (kSequences) {
    const float up = a.grad_nll[static_cast<uint32_t>(row) / static_cast<uint32_t>(a.inner)];
    const float top = id >= 0 && id < a.vocab ? -up : 0.0f;
    return {a.lse[row], 0.0f, -top, 0.0f, top, 1.0f};
  } else {
    const auto grad = [&](const float* of) { return of != nullptr ? of[row] : 0.0f; };
    const float top = id >= 0 && id < a.vocab ? grad(a.grad_logp) : 0.0f, lse = a.lse[row];
    const auto scale = static_cast<float>(a.scale);
    return {lse, a.entropy[row], grad(a.grad_lse) - top, grad(a.grad_entropy), top, scale};
  }
}

template <class T, bool kSequences>
__global__ void __launch_bounds__(kLogitThreads, 3) logit_grad_kernel(LogprobGradArgs a) {
  constexpr int kPer = kPerVector<T>;
  const int64_t row = blockIdx.x / static_cast<unsigned>(a.blocks), n = a.vocab;
  const int64_t block = blockIdx.x % static_cast<unsigned>(a.blocks);
  T* const out = static_cast<T*>(a.out) + row * n;
  // Vectors start where the output is aligned, the first one before the row if need be.
  const int64_t first = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 16 / sizeof(T));
  const int64_t from = first + block * blockDim.x * kLogitGradVectors * kPer;
  const bool counts = a.counts<kSequences>(row);
  // Of a row that does not count nothing is inside.
  const RowVectors<T> vectors(static_cast<const T*>(a.logits) + a.at<kSequences>(row),
                              counts ? n : 0, first);
  uint4 held[kLogitGradVectors];
  vectors.load(from + threadIdx.x * kPer, blockDim.x * kPer, held);
  const int64_t id = a.ids[row];
  LogitGrad g{};
  if (counts) g = logit_grad_of<kSequences>(a, row, id);
  const float entropy = g.entropy;
  const float of_p = g.of_p * g.scale, of_entropy = g.of_entropy * g.scale,
              of_id = g.of_id * g.scale;
  const auto scale_rest = static_cast<float>(a.scale - static_cast<double>(g.scale));
#pragma unroll
  for (int j = 0; j < kLogitGradVectors; ++j) {
    const int64_t i = from + (static_cast<int64_t>(j) * blockDim.x + threadIdx.x) * kPer;
    if (i >= n) break;
    const int at = id >= i && id < i + kPer ? static_cast<int>(id - i) : -1;
    float x[kPer], y[kPer];
    to_floats<T>(held[j], x);
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      // Rounded once: an error of the scale would be the same for all of the row.
      const float scaled = fmaf(x[k], g.scale, fmaxf(x[k], kLowestFloat) * scale_rest);
      const float log_p = scaled - g.lse, e = fast_exp2(log_p * kLog2E);
      const float d = -entropy - log_p;  // infinite where p is 0
      const float slope = fmaf(of_entropy, d > -kLowestFloat ? 0.0f : d, of_p);
      y[k] = fmaf(e, slope, k == at ? of_id : 0.0f);
      if (kSequences && !counts) y[k] = 0.0f;
    }
    if (i >= 0 && i + kPer <= n) {
      *reinterpret_cast<uint4*>(out + i) = from_floats<T>(y);
    } else {
#pragma unroll
      for (int k = 0; k < kPer; ++k)
        if (i + k >= 0 && i + k < n) from_float(y[k], out + i + k);
    }
  }
}

// Of with_chunks. Sequences: LogitRows in full, and no entropy; lse may be null.
template <class T, bool kSequences = false>
void launch_selective_logprob(const LogprobArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const int threads = logit_threads(a.chunk / kPerVector<T>, kLogitVectors);
  TENFOLD_LAUNCH((logit_sums_kernel<T, kSequences>), static_cast<unsigned>(a.rows * a.chunks),
                 threads, stream, a);
  if (a.chunks == 1) return;
  constexpr int kRows = kJoinThreads / 32;
  const auto blocks = static_cast<unsigned>((a.rows + kRows - 1) / kRows);
  TENFOLD_LAUNCH(join_sums_kernel<kSequences>, blocks, kJoinThreads, stream, a, dtype_of<T>());
}

// Vectors of a row: two more where its ends may lie inside of one.
template <class T>
int64_t grad_vectors(int64_t vocab) {
  constexpr int kPer = kPerVector<T>;
  return vocab % kPer == 0 ? vocab / kPer : vocab / kPer + 2;
}

template <class T>
LogprobGradArgs with_blocks(LogprobGradArgs a) {
  const int64_t n = grad_vectors<T>(a.vocab);
  const int64_t each = logit_threads(n, kLogitGradVectors) * kLogitGradVectors;
  a.blocks = static_cast<int>((n + each - 1) / each);
  return a;
}

template <class T, bool kSequences = false>
void launch_selective_logprob_backward(const LogprobGradArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const int threads = logit_threads(grad_vectors<T>(a.vocab), kLogitGradVectors);
  TENFOLD_LAUNCH((logit_grad_kernel<T, kSequences>), static_cast<unsigned>(a.rows * a.blocks),
                 threads, stream, a);
}

}  // namespace tenfold::cuda
