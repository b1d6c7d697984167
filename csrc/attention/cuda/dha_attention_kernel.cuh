// SPDX-License-Identifier: Apache-2.0
// Device code of the forward of dha_attention: one block per (sequence, query head, tile of rows)
// walks over the keys that its rows see. Per tile of keys: logits (tensor cores), running maximum
// and sum of each row, out = out * rescaling + weights x values. The next keys are on their way
// while the weights are made, the values while the logits are. Nothing but out and lse is written.
#pragma once

#include "attention/cuda/dropout.cuh"
#include "attention/cuda/prefill_launch.h"

namespace tenfold::cuda {

// kW: head dims padded to 64, 128 or 256. A warp owns 16 kM rows. Sizes are such that a block fits
// the 99 KB of shared memory that every device from sm_80 on has.
template <class T, int kWidth>
struct ForwardTile {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kW = kWidth;
  static constexpr int kM = kHalf && kW <= 128 ? 2 : 1;
  static constexpr int kWarps = !kHalf && kW == 256 ? 2 : 4;
  static constexpr int kKeys = kHalf ? 64 : kW == 256 ? 16 : 32;
  static constexpr int kBlocks = 2;  // on an SM: 8 warps, up to 255 registers a thread
  static constexpr int kN = kKeys / 8, kRows = 16 * kM * kWarps, kThreads = 32 * kWarps;
  static constexpr int kScratch = kWeightScratch<T, kM, kN>;
  static constexpr int kBytes = (kRows + 2 * kKeys) * kW * static_cast<int>(sizeof(T)) +
                                kWarps * kScratch * static_cast<int>(sizeof(float));
};

// A thread's rows: 16 m + lane / 4 + 8 half of its warp.
template <int kM>
struct RowState {
  float top[kM][2];  // maximum of the logits so far, in units of the accumulator
  float sum[kM][2];  // of this thread's columns
};

// What turns products into logits, for one (batch, query head).
struct LogitRule {
  AttentionMask mask;
  AttentionBias bias;  // of this batch and head
  int64_t num_queries, num_keys;
  float scale, softcap;  // scale: with a softcap, divided by it
  const float* window;   // shared memory: relative biases of the tile, see load_window(); or null
  // Products that need more than a positive factor are edited in place; then the factor is 1.
  __device__ bool edits() const {
    return softcap > 0.0f || bias.data != nullptr || window != nullptr || scale <= 0.0f;
  }
  __device__ float factor() const { return edits() ? 1.0f : scale; }
};

template <class Params>
__device__ inline LogitRule logit_rule(const Params& p, int64_t b, int64_t h, int64_t nq,
                                       int64_t nk, const float* window) {
  const float scale = p.softcap > 0.0f ? p.scale / p.softcap : p.scale;
  return {p.mask, bias_of(p.bias, b, h), nq, nk, scale, p.softcap, window};
}

// Products of rows [row0, ..) of this thread with keys from key0 on become logits (see edits());
// what a row does not see becomes -inf. seen[key] is set where somebody sees it (bias only).
// kT5: `corner` is the place in the window of the thread's row 0 and key 0.
template <class T, bool kT5, int kM, int kN>
__device__ inline void make_logits(const LogitRule& rule, int64_t row0, int64_t key0, bool masked,
                                   int* seen, int corner, float (&acc)[kM][kN][4]) {
  const int lane = threadIdx.x % 32;
  const bool edits = rule.edits();
  if (!masked && !edits) return;
  const int64_t first = row0 + lane / 4;  // of the thread's rows
  const int64_t at = first + first_place(rule.mask, rule.num_queries, rule.num_keys) - key0;
  const TileRange<8 * kN> sees_of(at - rule.mask.left, at + rule.mask.right + 1,
                                  rule.num_keys - key0);
  const int rows = in_tile(rule.num_queries - first, 16 * kM);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 16 * m + 8 * half;
      const int lo = sees_of.lo(i), hi = i < rows ? sees_of.hi(i) : 0;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = 8 * n + lane % 4 * 2 + e;
          const bool sees = key >= lo && key < hi;
          float& x = acc[m][n][2 * half + e];
          if (edits && sees) {
            x *= rule.scale;
            if constexpr (kT5) {
              if (rule.window != nullptr) x += rule.window[corner + key - (lane / 4 + i)];
              continue;
            }
            if (rule.softcap > 0.0f) x = rule.softcap * SoftmaxUnits<T>::tanh(x);
            if (rule.bias.data != nullptr) {
              const float add =
                  bias_at(rule.bias, (first + i) * rule.bias.row + (key0 + key) * rule.bias.key);
              x = add == bits_to_float(0xFF800000u) ? add : x + add;
              if (x != bits_to_float(0xFF800000u)) seen[key] = 1;
            }
          }
          if (!sees) x = bits_to_float(0xFF800000u);
        }
    }
}

// Logits to weights exp(factor (logit - top)); the state moves on and out is rescaled.
template <class T, int kM, int kN, int kTiles>
__device__ inline void softmax_step(float factor, RowState<kM>& state, float (&acc)[kM][kN][4],
                                    float (&out)[kM][kTiles][4], int dims) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.top[m][half];
#pragma unroll
      for (int n = 0; n < kN; ++n)
        top = fmaxf(top, fmaxf(acc[m][n][2 * half], acc[m][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
      // A row that has seen nothing yet: any finite base gives weights of 0.
      // The difference comes first: a mask of the lowest finite number times the factor would be
      // -inf, and an unchanged maximum must give exactly 1 (a fused a * factor - base would not).
      const float base = top == bits_to_float(0xFF800000u) ? 0.0f : top;
      const float shrink = SoftmaxUnits<T>::exp((state.top[m][half] - base) * factor);
      state.top[m][half] = top;
      float sum = state.sum[m][half] * shrink;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          acc[m][n][i] = SoftmaxUnits<T>::exp((acc[m][n][i] - base) * factor);
          sum += acc[m][n][i];
        }
      state.sum[m][half] = sum;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (8 * n >= dims) break;
        out[m][n][2 * half] *= shrink;
        out[m][n][2 * half + 1] *= shrink;
      }
    }
}

// Values that the bias hides from every row of the block must not reach the sums, whatever they
// hold: padding behind a mask may be anything.
template <class T, int kW, int kKeys, int kThreads>
__device__ inline void clear_hidden_rows(T* tile, const int* seen) {
  for (int i = threadIdx.x; i < kKeys * kW; i += kThreads)
    if (!seen[i / kW]) tile[i] = T{};
}

template <class T, int kW, bool kT5>
struct ForwardSteps {
  using C = ForwardTile<T, kW>;
  const GlobalRows<T> k, v;  // of the sequence, from key 0
  KeyRange keys;             // that anybody in the block sees
  LogitRule rule;
  int64_t row0;  // of the block
  T *q_tile, *k_tile, *v_tile;
  float* scratch;  // of this warp
  int *seen, *wild;
  const ForwardArgs& p;
  int64_t head;
  uint32_t sequence_head;
  float* window;

  __device__ void load(T* tile, const GlobalRows<T>& from, int64_t key0) const {
    const GlobalRows<T> rows{from.first + key0 * from.stride, from.stride, from.dims, from.vectors};
    load_tile<T, kW, C::kKeys, C::kThreads>(tile, rows, in_tile(keys.first - key0, C::kKeys),
                                            in_tile(keys.last - key0, C::kKeys));
    copy_commit();
  }

  // One tile of keys. On entry its keys are on their way, on exit the next ones.
  __device__ void step(int64_t key0, int dims, int value_dims, float factor, RowState<C::kM>& state,
                       float (&out)[C::kM][kW / 8][4]) const {
    const int warp_row = threadIdx.x / 32 * 16 * C::kM;
    const int64_t last_row =
        row0 + C::kRows < rule.num_queries ? row0 + C::kRows - 1 : rule.num_queries - 1;
    // Whether every row sees the whole tile: the last row's first key and the first one's last.
    const bool masked =
        tenfold::visible_keys(rule.mask, last_row, rule.num_queries, rule.num_keys).first > key0 ||
        tenfold::visible_keys(rule.mask, row0, rule.num_queries, rule.num_keys).last <
            key0 + C::kKeys;
    float acc[C::kM][C::kN][4] = {};
    copy_wait<0>();
    __syncthreads();  // keys (and queries) are there, the last values are used up
    load(v_tile, v, key0);
    if (threadIdx.x == 0) *wild = 0;
    if constexpr (kT5) {
      if (rule.window != nullptr)
        load_window(p, head, key0 - row0 - rule.mask.place - (C::kRows - 1), C::kRows + C::kKeys,
                    window);
    }
    if (rule.bias.data != nullptr)
      for (int i = threadIdx.x; i < C::kKeys; i += C::kThreads) seen[i] = 0;
    multiply_transposed<T, kW>(q_tile, warp_row, k_tile, 0, round_up(dims, 16), acc);
    copy_wait<0>();
    __syncthreads();  // values are there, keys are used up
    if (key0 + C::kKeys < keys.last) load(k_tile, k, key0 + C::kKeys);
    make_logits<T, kT5>(rule, row0 + warp_row, key0, masked, seen, C::kRows - 1 - warp_row, acc);
    softmax_step<T>(factor, state, acc, out, value_dims);
    if constexpr (kT5) {
      if (p.dropout.below != 0)
        drop_weights(p.dropout,
                     draw_kept<true, C::kM, C::kN>(p.dropout, sequence_head, row0 + warp_row, key0),
                     acc);
    }
    if (rule.bias.data != nullptr) {
      __syncthreads();
      clear_hidden_rows<T, kW, C::kKeys, C::kThreads>(v_tile, seen);
      __syncthreads();
    }
    if (masked || rule.bias.data != nullptr) {
      find_wild<T, kW, C::kKeys, C::kThreads>(v_tile, value_dims, wild);
      __syncthreads();
      if (*wild) return accumulate_seen<T, kW>(acc, v_tile, value_dims, out);
    }
    accumulate<T, kW>(acc, v_tile, value_dims, scratch, out);
  }
};

template <class T, int kW, bool kT5>
__global__ void __launch_bounds__(ForwardTile<T, kW>::kThreads, ForwardTile<T, kW>::kBlocks)
    dha_attention_kernel(ForwardArgs p) {
  using C = ForwardTile<T, kW>;
  TENFOLD_SHARED(int, chosen, 1);
  TENFOLD_SHARED(int, seen, C::kKeys);
  TENFOLD_SHARED(int, wild, 1);
  TENFOLD_SHARED(float, window, kT5 ? C::kRows + C::kKeys : 1);
  TENFOLD_DYNAMIC_SHARED(memory);
  const Work w = find_work(p.queries, p.batch, p.q_heads, C::kRows, blockIdx.x, true);
  if (w.first < 0) return;
  const int64_t h = ranked_head(p.q_to_k, p.q_heads, w.head, chosen), row0 = w.first;
  const int64_t hk = clamped(p.q_to_k[h], p.k_heads - 1), hv = clamped(p.q_to_v[h], p.v_heads - 1);
  const Rows qs = sequence_rows(p.queries, p.batch, w.batch);
  const Rows ks = w.batch < p.batch ? key_rows(p, w.batch) : Rows{0, 0};
  const int dims = static_cast<int>(p.head_dim), value_dims = static_cast<int>(p.value_dim);
  const int rows = in_tile(qs.count - row0, C::kRows), warp = threadIdx.x / 32;
  T* const tiles = reinterpret_cast<T*>(memory);
  float* const scratch = reinterpret_cast<float*>(tiles + (C::kRows + 2 * C::kKeys) * kW);
  const int64_t first = tenfold::visible_keys(p.mask, row0, qs.count, ks.count).first;
  const int64_t last = tenfold::visible_keys(p.mask, row0 + rows - 1, qs.count, ks.count).last;
  const ForwardSteps<T, kW, kT5> steps{
      {row_at<T>(p.k, p.k_at, w.batch, hk, ks.first), p.k_at.row, dims, p.k_vectors},
      {row_at<T>(p.v, p.v_at, w.batch, hv, ks.first), p.v_at.row, value_dims, p.v_vectors},
      {first, last},
      logit_rule(p, w.batch, h, qs.count, ks.count,
                 kT5 && p.relative_lut != nullptr ? window : nullptr),
      row0,
      tiles,
      tiles + C::kRows * kW,
      tiles + (C::kRows + C::kKeys) * kW,
      scratch + warp * C::kScratch,
      seen,
      wild,
      p,
      h,
      static_cast<uint32_t>(w.batch * p.q_heads + h),
      window};
  const GlobalRows<T> q{row_at<T>(p.q, p.q_at, w.batch, h, qs.first + row0), p.q_at.row, dims,
                        p.q_vectors};
  float out[C::kM][kW / 8][4] = {};
  RowState<C::kM> state;
#pragma unroll
  for (int m = 0; m < C::kM; ++m)
    for (int half = 0; half < 2; ++half)
      state.top[m][half] = bits_to_float(0xFF800000u), state.sum[m][half] = 0.0f;
  const float factor = steps.rule.factor() * SoftmaxUnits<T>::kPerNatural;
  if (first < last) {
    load_tile<T, kW, C::kRows, C::kThreads>(steps.q_tile, q, 0, rows);
    const int64_t start = first / C::kKeys * C::kKeys;
    steps.load(steps.k_tile, steps.k, start);
    for (int64_t key0 = start; key0 < last; key0 += C::kKeys)
      steps.step(key0, dims, value_dims, factor, state, out);
  }
  const int lane = threadIdx.x % 32, warp_row = warp * 16 * C::kM;
  float shares[C::kM][2];
#pragma unroll
  for (int m = 0; m < C::kM; ++m)
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
      const bool sees = sum != 0.0f;  // NaN sums see something
      shares[m][half] = sees ? 1.0f / sum : 0.0f;
      const int row = warp_row + 16 * m + lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < rows)
        p.lse[w.batch * p.lse_batch + h * p.lse_head + qs.first + row0 + row] =
            sees ? state.top[m][half] * steps.rule.factor() + logf(sum)
                 : bits_to_float(0xFF800000u);
    }
  T* const to = static_cast<T*>(p.out) + w.batch * p.out_at.batch + h * p.out_at.head +
                (qs.first + row0 + warp_row) * p.out_at.row;
  store_rows<T, kW>(out, shares, steps.q_tile, warp_row, to, p.out_at.row, rows - warp_row,
                    value_dims, p.out_vectors);
}

// Blocks of the launch below.
template <class T, int kW>
int64_t forward_blocks(const ForwardArgs& p) {
  return p.q_heads * tiles_per_head(p.queries, p.batch, ForwardTile<T, kW>::kRows);
}

template <class T, int kW, bool kT5>
void launch_dha_attention(const ForwardArgs& p, cudaStream_t stream) {
  using C = ForwardTile<T, kW>;
  const int64_t blocks = forward_blocks<T, kW>(p);
  if (blocks == 0) return;
  TENFOLD_LAUNCH_SHARED((dha_attention_kernel<T, kW, kT5>), static_cast<unsigned>(blocks),
                        C::kThreads, C::kBytes, C::kBytes, stream, p);
}

}  // namespace tenfold::cuda
