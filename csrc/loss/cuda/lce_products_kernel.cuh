// The products of linear_cross_entropy: logits of a tile and what is made of them on the spot (sums
// of the rows, or the gradients d of the logits), then grad_weight = d^T hidden and
// grad_hidden = d weight. d is kept for a chunk of rows and a block of the vocabulary at a time.
// Sums over the vocabulary are those of fixed segments of it, added in order, so that a row's
// gradient does not depend on the batch.
#pragma once

#include "loss/cuda/lce_rows_kernel.cuh"
#include "loss/cuda/tile_product.cuh"

namespace tenfold::cuda {

struct LceMatrices {
  const void *hidden, *weight;
  int64_t hidden_stride, weight_stride;
  int64_t dim, vocab;
  bool hidden_vectors, weight_vectors;  // rows are whole, aligned 16-byte vectors
  float softcap, scale;                 // 0: none; 1 / temperature
};

template <class T>
__device__ inline int depth_steps(int64_t depth) {
  return static_cast<int>((depth + ProductTile<T>::kDepth - 1) / ProductTile<T>::kDepth);
}

// From the thread's first column of the tile at v on: how many tokens there are, at most a tile.
template <class T>
__device__ inline int columns_inside(const LceMatrices& a, int64_t v) {
  using P = ProductTile<T>;
  return static_cast<int>(a.vocab - v < P::kCols ? a.vocab - v : P::kCols) - P::first_col();
}

// Logits of the rows `rows` of hidden (-1: none), and of `tiles` tiles of the vocabulary from v on,
// -inf beyond it: use(v of the tile, sums). kCapped: there may be a softcap. It is a parameter
// because of the registers that it takes.
template <class T, bool kCapped, class Use>
__device__ inline void for_logits(const LceMatrices& a, const int* rows, int64_t v, int tiles,
                                  char* memory, const Use& use) {
  using P = ProductTile<T>;
  const auto* const hidden = static_cast<const T*>(a.hidden);
  const auto* const weight = static_cast<const T*>(a.weight);
  const auto load = [&](int tile, int step, T* left, T* right) {
    const int64_t k = static_cast<int64_t>(step) * P::kDepth;
    load_operand<T, Lies::along, P::kRows>(
        left, hidden, a.dim - k, a.hidden_vectors, [&](int r) -> const T* {
          return rows[r] >= 0 ? hidden + rows[r] * a.hidden_stride + k : nullptr;
        });
    const int64_t first = v + static_cast<int64_t>(tile) * P::kCols;
    load_operand<T, Lies::along, P::kCols>(
        right, weight, a.dim - k, a.weight_vectors, [&](int r) -> const T* {
          return first + r < a.vocab ? weight + (first + r) * a.weight_stride + k : nullptr;
        });
  };
  run_product<T, Lies::along, Lies::along>(
      memory, tiles, depth_steps<T>(a.dim), load, [&](int tile, typename P::Sums& x) {
        const int64_t first = v + static_cast<int64_t>(tile) * P::kCols;
        if (kCapped && a.softcap > 0.0f) {
#pragma unroll
          for (int m = 0; m < P::kM; ++m)
#pragma unroll
            for (int n = 0; n < P::kN; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) x[m][n][i] = a.softcap * tanhf(x[m][n][i] / a.softcap);
        }
        if (first + P::kCols > a.vocab) {
          const int inside = columns_inside<T>(a, first);
#pragma unroll
          for (int n = 0; n < P::kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int m = 0; m < P::kM; ++m)
                if (8 * n + i % 2 >= inside) x[m][n][i] = -INFINITY;
        }
        use(first, x);
      });
}

// Rows of hidden of a tile of those that count.
template <class T>
__device__ inline void load_row_tile(const PackedRows& rows, int64_t first, int* row) {
  const int64_t count = rows.state->count;
  for (int i = threadIdx.x; i < ProductTile<T>::kRows; i += ProductTile<T>::kThreads)
    row[i] = first + i < count ? rows.row[first + i] : -1;
}

// Where the target of a row is among the thread's columns of the tile at v, 8 n + i; else -1.
template <class T>
__device__ inline int chosen_column(int target, int64_t v) {
  using P = ProductTile<T>;
  const int64_t at = target - v - P::first_col();
  return target >= 0 && at >= 0 && at < 8 * P::kN && at % 8 < 2 ? static_cast<int>(at) : -1;
}

// What a thread has seen of a row: relative to `max`, weighted by log2 of exp.
struct RunningSums {
  float max, sum, weighted;
};

template <bool kWeighted>
__device__ inline void move_to(RunningSums* a, float max, float factor) {
  const float d = (a->max - max) * factor, by = fast_exp2(d);
  if constexpr (kWeighted) a->weighted = fmaf(a->sum, fmaxf(d, kZeroExponent), a->weighted) * by;
  a->sum *= by;
  a->max = max;
}

template <bool kWeighted>
__device__ inline void join_running(RunningSums* a, RunningSums b, float factor) {
  const float max = fmaxf(a->max, b.max);
  move_to<kWeighted>(a, max, factor);
  move_to<kWeighted>(&b, max, factor);
  a->sum += b.sum;
  if constexpr (kWeighted) a->weighted += b.weighted;
}

struct LceSumsArgs {
  LceMatrices m;
  PackedRows rows;
  int64_t first;  // of the rows that count
  int row_tiles, ranges;
  int tiles_of_range;
  RangeSums* parts;  // [rows from first][ranges]
};

// A block: a tile of rows, a range of the vocabulary. Neighbours share the range: it is read once.
template <class T, bool kCapped, bool kWeighted>
__global__ void __launch_bounds__(ProductTile<T>::kThreads, 1) lce_sums_kernel(LceSumsArgs a) {
  using P = ProductTile<T>;
  TENFOLD_DYNAMIC_SHARED(memory);
  TENFOLD_SHARED(int, row, P::kRows);
  TENFOLD_SHARED(int, target, P::kRows);
  const int64_t tile = blockIdx.x % static_cast<unsigned>(a.row_tiles);
  const int range = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.row_tiles));
  const int64_t first = a.first + tile * P::kRows, count = a.rows.state->count;
  if (first >= count) return;
  load_row_tile<T>(a.rows, first, row);
  for (int i = threadIdx.x; i < P::kRows; i += P::kThreads)
    target[i] = first + i < count ? a.rows.target[first + i] : -1;
  __syncthreads();
  const int all_tiles = static_cast<int>((a.m.vocab + P::kCols - 1) / P::kCols);
  const int first_tile = range * a.tiles_of_range;
  const int tiles =
      all_tiles - first_tile < a.tiles_of_range ? all_tiles - first_tile : a.tiles_of_range;
  const float factor = a.m.scale * kLog2E;
  RunningSums seen[P::kM][2];
#pragma unroll
  for (int m = 0; m < P::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) seen[m][half] = {kLowestFloat, 0.0f, 0.0f};
  const int row0 = P::first_row();
  const auto use = [&](int64_t v, typename P::Sums& x) {
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RunningSums& s = seen[m][half];
        float max = s.max;
#pragma unroll
        for (int n = 0; n < P::kN; ++n)
          max = fmaxf(max, fmaxf(x[m][n][2 * half], x[m][n][2 * half + 1]));
        move_to<kWeighted>(&s, max, factor);
#pragma unroll
        for (int n = 0; n < P::kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float d = (x[m][n][2 * half + i] - max) * factor, e = fast_exp2(d);
            s.sum += e;
            if constexpr (kWeighted) s.weighted = fmaf(fmaxf(d, kZeroExponent), e, s.weighted);
          }
        const int at = row0 + 16 * m + 8 * half;
        const int chosen = chosen_column<T>(target[at], v);
        if (chosen < 0) continue;
#pragma unroll
        for (int n = 0; n < P::kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (chosen == 8 * n + i) a.rows.chosen[first + at] = x[m][n][2 * half + i];
      }
  };
  for_logits<T, kCapped>(a.m, row, static_cast<int64_t>(first_tile) * P::kCols, tiles, memory, use);
  // Four lanes have a row, and kWarpsAcross warps.
  __syncthreads();
  auto* const parts = reinterpret_cast<RunningSums*>(memory);  // [kWarpsAcross][kRows]
#pragma unroll
  for (int m = 0; m < P::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RunningSums s = seen[m][half];
      for (int step = 1; step < 4; step *= 2) {
        const float max = __shfl_xor_sync(0xFFFFFFFFu, s.max, step);
        const float sum = __shfl_xor_sync(0xFFFFFFFFu, s.sum, step);
        const float weighted = __shfl_xor_sync(0xFFFFFFFFu, s.weighted, step);
        join_running<kWeighted>(&s, {max, sum, weighted}, factor);
      }
      if (threadIdx.x % 4 == 0)
        parts[P::warp_col() / (8 * P::kN) * P::kRows + row0 + 16 * m + 8 * half] = s;
    }
  __syncthreads();
  const int r = threadIdx.x;
  if (r >= P::kRows || row[r] < 0) return;
  RunningSums all = parts[r];
  for (int w = 1; w < P::kWarpsAcross; ++w)
    join_running<kWeighted>(&all, parts[w * P::kRows + r], factor);
  a.parts[(tile * P::kRows + r) * a.ranges + range] = {all.max, all.sum,
                                                       all.weighted * static_cast<float>(kLn2)};
}

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

// Two neighbours.
template <class T>
__device__ inline void store_two(T* to, float low, float high) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(low, high);
  } else {
    const uint64_t bits = static_cast<uint64_t>(float_to_bits(high)) << 32 | float_to_bits(low);
    *reinterpret_cast<uint64_t*>(to) = bits;
  }
}

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
  const float rate = kCapped && a.m.softcap > 0.0f ? 1.0f / a.m.softcap : 0.0f;
  const auto use = [&](int64_t v, typename P::Sums& x) {
    const int inside = columns_inside<T>(a.m, v);
    const int64_t row0 = r0 + P::first_row(), col0 = v - a.block.v + P::first_col();
    const LceRow* const slopes = a.rows.slopes + a.block.first + row0;
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = 16 * m + 8 * half;
        if (P::first_row() + r >= rows) continue;
        const LceRow s = slopes[r];
        const int chosen = chosen_column<T>(s.target, v);
        const int64_t to = (row0 + r) * a.block.pitch + col0;
#pragma unroll
        for (int n = 0; n < P::kN; ++n) {
          float d[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float logit = x[m][n][2 * half + i];
            // log p; lse - entropy would lose what the logits' size takes from a float.
            const float log_p = logit * a.m.scale - s.lse, e = fast_exp2(log_p * kLog2E);
            const float away = -s.entropy - log_p;  // infinite where p is 0
            const float slope = fmaf(s.of_entropy, away > -kLowestFloat ? 0.0f : away, s.of_p);
            const float y = fmaf(e, slope, chosen == 8 * n + i ? s.of_id : 0.0f);
            const float t = logit * rate;
            d[i] = kCapped && a.m.softcap > 0.0f ? fmaf(-t * t, y, y) : y;
          }
          d[0] = 8 * n < inside ? d[0] : 0.0f, d[1] = 8 * n + 1 < inside ? d[1] : 0.0f;
          store_two(static_cast<T*>(a.block.d) + to + 8 * n, d[0], d[1]);
          if constexpr (std::is_same_v<T, fp16_t>)
            if (a.block.d_weight != nullptr)
              store_two(static_cast<T*>(a.block.d_weight) + to + 8 * n, d[0] * s.to_weight,
                        d[1] * s.to_weight);
        }
      }
  };
  for_logits<T, kCapped>(a.m, row, a.block.v + tile * P::kCols, 1, memory, use);
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
    load_operand<T, Lies::across, P::kRows>(left, d, P::kRows, true, [&](int r) -> const T* {
      return k + r < count ? d + (k + r) * a.block.pitch : nullptr;
    });
    load_operand<T, Lies::across, P::kCols>(
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
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t r = token + P::first_row() + 16 * m + 8 * half;
        if (r >= a.block.tokens) continue;
#pragma unroll
        for (int n = 0; n < P::kN; ++n) {
          const int64_t c = col + P::first_col() + 8 * n, at = r * dim + c;
          float x[2] = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
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
      }
  };
  run_product<T, Lies::across, Lies::across>(memory, 1, depth_steps<T>(count), load, finish);
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
    load_operand<T, Lies::along, P::kRows>(left, d, P::kDepth, true, [&](int r) -> const T* {
      return r0 + r < count ? d + (r0 + r) * a.block.pitch + k : nullptr;
    });
    const int64_t v = a.block.v + token + k;
    load_operand<T, Lies::across, P::kCols>(
        right, weight, dim - col, a.m.weight_vectors, [&](int r) -> const T* {
          return v + r < a.m.vocab ? weight + (v + r) * a.m.weight_stride + col : nullptr;
        });
  };
  const bool add = a.add && a.splits == 1;
  float* const out =
      a.splits == 1 ? a.sums + a.block.first * dim : a.parts + split * a.block.rows * dim;
  const auto finish = [&](int, typename P::Sums& sums) {
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t r = r0 + P::first_row() + 16 * m + 8 * half;
        if (r >= count) continue;
        float* const to = out + r * dim;
#pragma unroll
        for (int n = 0; n < P::kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t c = col + P::first_col() + 8 * n + i;
            const float x = sums[m][n][2 * half + i];
            if (c < dim) to[c] = add ? to[c] + x : x;
          }
      }
  };
  run_product<T, Lies::along, Lies::across>(memory, 1, depth_steps<T>(tokens), load, finish);
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
