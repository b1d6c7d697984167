// SPDX-License-Identifier: Apache-2.0
// The backward pass of linear_cross_entropy: the gradients d of the logits, then grad_weight =
// d^T hidden and grad_hidden = d weight. d is kept for a chunk of rows and a block of the
// vocabulary at a time. Sums over the vocabulary are those of fixed segments of it, added in order,
// so that a row's gradient does not depend on the batch.
#pragma once

#include "loss/cuda/lce_logits.cuh"

namespace tenfold::cuda {

// d of a chunk of rows and a block of the vocabulary: [chunk rows][pitch], 0 beyond the vocabulary.
struct LceBlock {
  int64_t first;  // of the rows that count
  int64_t rows;   // of the chunk, at most
  int row_tiles;
  int64_t v, tokens;  // of the vocabulary
  void* d;
  void* d_weight;  // with the scale of all rows, where rows have scales of their own; else null
  int64_t pitch;   // whole tiles of tokens

  __device__ int64_t count(const PackedRows& packed) const {
    const int64_t left = packed.state->count - first;
    return left < 0 ? 0 : left < rows ? left : rows;
  }
};

struct LceDeltasArgs {
  LceMatrices m;
  PackedRows rows;
  LceBlock block;
};

template <class T, bool kCapped>
__global__ void __launch_bounds__(ProductTile<T>::kThreads, 1) lce_deltas_kernel(LceDeltasArgs a) {
  using P = ProductTile<T>;
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int, row, P::kRows);
  const int64_t count = a.block.count(a.rows);
  const int64_t r0 = blockIdx.x % static_cast<unsigned>(a.block.row_tiles) * int64_t{P::kRows};
  const int64_t tile = blockIdx.x / static_cast<unsigned>(a.block.row_tiles);
  if (r0 >= count) return;
  load_row_tile<T>(a.rows, a.block.first + r0, row);
  __syncthreads();
  const int rows = static_cast<int>(count - r0 < P::kRows ? count - r0 : P::kRows);
  const auto use = [&](int64_t v, typename P::Sums& x) {
    const int inside = columns_inside<T>(a.m, v);
    const int64_t col0 = v - a.block.v + P::first_col();
    const LceRow* const slopes = a.rows.slopes + a.block.first + r0;
    for_rows<P>(x, [&](int r, const float (&products)[P::kN][2]) {
      if (r >= rows) return;
      const LceRow s = slopes[r];
      const int chosen = chosen_column<T>(s.target, v);
      const int64_t to = (r0 + r) * a.block.pitch + col0;
#pragma unroll
      for (int n = 0; n < P::kN; ++n) {
        float d[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float product = products[n][i];
          const float logit = kCapped ? capped(product, a.m.softcap) : product;
          // log p; lse - entropy would lose what the logits' size takes from a float.
          const float log_p = logit * a.m.scale - s.lse, e = fast_exp2(log_p * kLog2E);
          const float away = -s.entropy - log_p;  // infinite where p is 0
          const float slope = fmaf(s.of_entropy, away > -kLowestFloat ? 0.0f : away, s.of_p);
          const float y = fmaf(e, slope, chosen == 8 * n + i ? s.of_id : 0.0f);
          d[i] = kCapped ? y * cap_slope(product, a.m.softcap) : y;
        }
        d[0] = 8 * n < inside ? d[0] : 0.0f, d[1] = 8 * n + 1 < inside ? d[1] : 0.0f;
        store_two(static_cast<T*>(a.block.d) + to + 8 * n, d[0], d[1]);
        if constexpr (std::is_same_v<T, fp16_t>)
          if (a.block.d_weight != nullptr)
            store_two(static_cast<T*>(a.block.d_weight) + to + 8 * n, d[0] * s.to_weight,
                      d[1] * s.to_weight);
      }
    });
  };
  for_logits<T>(a.m, row, a.block.v + tile * P::kCols, 1, memory, use);
}

struct LceWeightArgs {
  LceMatrices m;
  PackedRows rows;
  LceBlock block;
  int col_tiles;
  const float* before;  // [tokens][dim]: of the chunks so far, or null
  void* out;            // [tokens][dim]: sums so far, or of all rows as T
  bool last;
};

// A block: kRows tokens, kCols columns of grad_weight, all rows of the chunk.
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads, 1) lce_weight_kernel(LceWeightArgs a) {
  using P = ProductTile<T>;
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int, rows, 2 * P::kDepth);  // of hidden, of this step and the next
  const int64_t count = a.block.count(a.rows), dim = a.m.dim;
  const int64_t col = blockIdx.x % static_cast<unsigned>(a.col_tiles) * int64_t{P::kCols};
  const int64_t token = blockIdx.x / static_cast<unsigned>(a.col_tiles) * int64_t{P::kRows};
  const void* const deltas = a.block.d_weight != nullptr ? a.block.d_weight : a.block.d;
  const auto* const d = static_cast<const T*>(deltas) + token;
  const auto* const hidden = static_cast<const T*>(a.m.hidden);
  const int* const packed = a.rows.row + a.block.first;
  for (int i = threadIdx.x; i < P::kDepth && i < count; i += P::kThreads) rows[i] = packed[i];
  __syncthreads();
  const auto load = [&](int, int step, T* left, T* right) {
    const int64_t k = static_cast<int64_t>(step) * P::kDepth;
    const int* const row = rows + step % 2 * P::kDepth;
    load_operand<P, Lies::across, P::kRows>(left, d, P::kRows, true, [&](int r) -> const T* {
      return k + r < count ? d + (k + r) * a.block.pitch : nullptr;
    });
    load_operand<P, Lies::across, P::kCols>(
        right, hidden, dim - col, a.m.hidden_vectors, [&](int r) -> const T* {
          return k + r < count ? hidden + row[r] * a.m.hidden_stride + col : nullptr;
        });
    // Rows of the next step arrive with this one. There is room beyond the last.
    const int i = static_cast<int>(threadIdx.x) * 4;
    if (i < P::kDepth && k + P::kDepth < count)
      copy16_async(rows + (step + 1) % 2 * P::kDepth + i, packed + k + P::kDepth + i, true);
  };
  const float factor = a.last ? 1.0f / a.rows.state->grad_scale : 1.0f;
  const auto finish = [&](int, typename P::Sums& sums) {
    for_rows<P>(sums, [&](int row, const float (&products)[P::kN][2]) {
      const int64_t r = token + row;
      if (r >= a.block.tokens) return;
#pragma unroll
      for (int n = 0; n < P::kN; ++n) {
        const int64_t c = col + P::first_col() + 8 * n, at = r * dim + c;
        float x[2] = {products[n][0], products[n][1]};
        const bool both = c + 1 < dim;
        if (c >= dim) break;
        if (a.before != nullptr) {
          x[0] += a.before[at];
          if (both) x[1] += a.before[at + 1];
        }
        x[0] *= factor, x[1] *= factor;
        const auto store = [&](auto* to) {
          if (dim % 2 == 0) return store_two(to, x[0], x[1]);
          from_float(x[0], to);
          if (both) from_float(x[1], to + 1);
        };
        if (a.last) {
          store(static_cast<T*>(a.out) + at);
        } else {
          store(static_cast<float*>(a.out) + at);
        }
      }
    });
  };
  run_product<P, Lies::across, Lies::across>(memory, 1, depth_steps<T>(count), load, finish);
}

struct LceHiddenArgs {
  LceMatrices m;
  PackedRows rows;
  LceBlock block;
  int col_tiles;
  int64_t token, segment;  // of the block: the first of these segments
  int splits;              // segments, each by blocks of its own
  float* sums;             // [rows that count][dim]
  float* parts;            // [splits][chunk rows][dim], if there are several
  bool add;
};

// A block: kRows rows, kCols columns of grad_hidden, a segment of the vocabulary.
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads, 1) lce_hidden_kernel(LceHiddenArgs a) {
  using P = ProductTile<T>;
  TENFOLD_DYNAMIC_SHARED(memory);
  const int64_t count = a.block.count(a.rows), dim = a.m.dim;
  unsigned at = blockIdx.x;
  const int64_t r0 = at % static_cast<unsigned>(a.block.row_tiles) * int64_t{P::kRows};
  at /= static_cast<unsigned>(a.block.row_tiles);
  const int64_t col = at % static_cast<unsigned>(a.col_tiles) * int64_t{P::kCols};
  const int64_t split = at / static_cast<unsigned>(a.col_tiles);
  if (r0 >= count) return;
  const int64_t token = a.token + split * a.segment, left_over = a.block.tokens - token;
  const int64_t tokens = left_over < a.segment ? left_over : a.segment;
  const auto* const d = static_cast<const T*>(a.block.d) + token;
  const auto* const weight = static_cast<const T*>(a.m.weight);
  const auto load = [&](int, int step, T* left, T* right) {
    const int64_t k = static_cast<int64_t>(step) * P::kDepth;
    load_operand<P, Lies::along, P::kRows>(left, d, P::kDepth, true, [&](int r) -> const T* {
      return r0 + r < count ? d + (r0 + r) * a.block.pitch + k : nullptr;
    });
    const int64_t v = a.block.v + token + k;
    load_operand<P, Lies::across, P::kCols>(
        right, weight, dim - col, a.m.weight_vectors, [&](int r) -> const T* {
          return v + r < a.m.vocab ? weight + (v + r) * a.m.weight_stride + col : nullptr;
        });
  };
  const bool add = a.add && a.splits == 1;
  float* const out =
      a.splits == 1 ? a.sums + a.block.first * dim : a.parts + split * a.block.rows * dim;
  const auto finish = [&](int, typename P::Sums& sums) {
    for_rows<P>(sums, [&](int row, const float (&products)[P::kN][2]) {
      const int64_t r = r0 + row;
      if (r >= count) return;
      float* const to = out + r * dim;
#pragma unroll
      for (int n = 0; n < P::kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t c = col + P::first_col() + 8 * n + i;
          if (c < dim) to[c] = add ? to[c] + products[n][i] : products[n][i];
        }
    });
  };
  run_product<P, Lies::along, Lies::across>(memory, 1, depth_steps<T>(tokens), load, finish);
}

constexpr int kAddThreads = 256;

// A block a row: the sums of the segments, in order.
static __global__ void __launch_bounds__(kAddThreads) add_splits_kernel(LceHiddenArgs a) {
  const int64_t row = blockIdx.x, dim = a.m.dim;
  if (row >= a.block.count(a.rows)) return;
  float* const sums = a.sums + (a.block.first + row) * dim;
  for (int64_t i = threadIdx.x; i < dim; i += kAddThreads) {
    float sum = a.add ? sums[i] : 0.0f;
    for (int s = 0; s < a.splits; ++s) {
      const float part = a.parts[(s * a.block.rows + row) * dim + i];
      sum = s > 0 || a.add ? sum + part : part;
    }
    sums[i] = sum;
  }
}

}  // namespace tenfold::cuda
