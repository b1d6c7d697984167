// SPDX-License-Identifier: Apache-2.0
// Device code of masked_adamw_: a block takes a chunk of one tensor, a thread 16 bytes of
// parameters at a time. A thread whose elements are all frozen loads nothing but mask bits.
#pragma once

#include "optim/cuda/adamw_table.cuh"

namespace tenfold::cuda {

template <class P>
constexpr int kAdamwPack = 16 / static_cast<int>(sizeof(P));
template <class P>
constexpr int64_t kAdamwChunk = 8 * kAdamwThreads * kAdamwPack<P>;  // 32 KB of parameters

// The values of one thread, parameters and states as they lie in memory.
template <class P, class S, int N>
struct AdamwValues {
  Pack<P, N> p, g;
  Pack<S, N> m, v, max;
};

// A wrong prefix must not reach further than the states.
__device__ inline bool inside(int64_t at, int64_t numel) {
  return static_cast<uint64_t>(at) < static_cast<uint64_t>(numel);
}

// States of the trained elements one after another from `at` on, into the places of their elements.
template <class S, int N>
__device__ inline void load_compact(const void* from, int64_t at, int64_t numel, uint32_t bits,
                                    Pack<S, N>* pack) {
  for (int k = 0; k < N; ++k)
    if (bits >> k & 1) {
      if (inside(at, numel)) pack->x[k] = static_cast<const S*>(from)[at];
      ++at;
    }
}

template <class S, int N>
__device__ inline void store_compact(void* to, int64_t at, int64_t numel, uint32_t bits,
                                     const Pack<S, N>& pack) {
  for (int k = 0; k < N; ++k)
    if (bits >> k & 1) {
      if (inside(at, numel)) static_cast<S*>(to)[at] = pack.x[k];
      ++at;
    }
}

// Updates the trained ones (bits) of n elements; with param_only the states of all.
template <class P, class S, int N>
__device__ inline void update_values(AdamwValues<P, S, N>* x, const AdamwTensor& t,
                                     const AdamwScalars& s, const AdamwOptions& o, int64_t i, int n,
                                     uint32_t bits) {
  const auto c = adamw_constants<FloatOps>(s);
  const bool stochastic = o.stochastic && t.dtype == Dtype::bf16;
  Philox4 noise{};
  if (stochastic) noise = rounding_noise(o.seed, s, t.id, i);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const bool trains = (bits >> k & 1) != 0;
    if (k >= n || !(trains || o.param_only)) continue;
    float m = to_float(x->m.x[k]), v = to_float(x->v.x[k]);
    adamw_moments<FloatOps>(c, scaled_gradient(s, to_float(x->g.x[k])), &m, &v);
    from_float(m, &x->m.x[k]);
    from_float(v, &x->v.x[k]);
    if (t.max_exp_avg_sq != nullptr) {
      const float before = to_float(x->max.x[k]);
      v = before != before || before > v ? before : v;  // NaN stays, from either
      from_float(v, &x->max.x[k]);
    }
    if (!trains) continue;
    float p = adamw_param<FloatOps>(c, to_float(x->p.x[k]), m, v);
    if (stochastic) p = round_stochastic(p, noise.word[(k & 7) >> 1] >> (16 * (k & 1)) & 0xFFFF);
    from_float(p, &x->p.x[k]);
  }
}

template <class P, class S>
__global__ void __launch_bounds__(kAdamwThreads)
    masked_adamw_kernel(const __grid_constant__ AdamwTable<AdamwTensor> table,
                        const AdamwScalars* scalars, const AdamwOptions o) {
  constexpr int N = kAdamwPack<P>;
  const int chunk = static_cast<int>(blockIdx.x), at = find_tensor(table, chunk);
  const AdamwTensor& t = table.tensor[at];
  const AdamwScalars s = scalars[table.scalars[at]];
  if (s.skips) return;
  auto* const p = static_cast<P*>(t.param);
  const auto* const g = static_cast<const P*>(t.grad);
  auto *const m = static_cast<S*>(t.exp_avg), *const v = static_cast<S*>(t.exp_avg_sq);
  auto* const max = static_cast<S*>(t.max_exp_avg_sq);
  const bool compact = t.prefix != nullptr, amsgrad = max != nullptr;
  const bool packs = aligned16(p) && aligned16(g);
  const bool state_packs = !compact && aligned16(m) && aligned16(v) && aligned16(max);
  const int64_t begin = (chunk - table.first_chunk[at]) * kAdamwChunk<P>;
  const int length =
      static_cast<int>(t.numel - begin < kAdamwChunk<P> ? t.numel - begin : kAdamwChunk<P>);
  for (int from = static_cast<int>(threadIdx.x) * N; from < length; from += kAdamwThreads * N) {
    const int64_t i = begin + from;
    const int n = length - from < N ? length - from : N;
    const uint32_t bits = trained_bits(t.mask, i, n);
    if (bits == 0 && !o.param_only) continue;
    const bool whole = n == N && packs, state_whole = n == N && state_packs;
    const int64_t first = compact ? adamw_state_position(t, i) : i;
    AdamwValues<P, S, N> x{};
    x.p = load_pack<P, N>(p + i, n, whole);
    x.g = load_pack<P, N>(g + i, n, whole);
    if (compact) {
      load_compact<S, N>(m, first, t.state_numel, bits, &x.m);
      load_compact<S, N>(v, first, t.state_numel, bits, &x.v);
      if (amsgrad) load_compact<S, N>(max, first, t.state_numel, bits, &x.max);
    } else {
      x.m = load_pack<S, N>(m + i, n, state_whole);
      x.v = load_pack<S, N>(v + i, n, state_whole);
      if (amsgrad) x.max = load_pack<S, N>(max + i, n, state_whole);
    }
    update_values(&x, t, s, o, i, n, bits);
    if (bits != 0) store_pack<P, N>(p + i, x.p, n, whole);
    if (compact) {
      store_compact<S, N>(m, first, t.state_numel, bits, x.m);
      store_compact<S, N>(v, first, t.state_numel, bits, x.v);
      if (amsgrad) store_compact<S, N>(max, first, t.state_numel, bits, x.max);
    } else {
      store_pack<S, N>(m + i, x.m, n, state_whole);
      store_pack<S, N>(v + i, x.v, n, state_whole);
      if (amsgrad) store_pack<S, N>(max + i, x.max, n, state_whole);
    }
  }
}

// f.operator()<P, S>() for the dtypes of a parameter and its states.
template <class F>
void dispatch_adamw(Dtype dtype, Dtype state, const F& f) {
  if (dtype == Dtype::f32) {
    if (state == Dtype::f32) f.template operator()<float, float>();
    if (state == Dtype::bf16) f.template operator()<float, bf16_t>();
  } else if (dtype == Dtype::bf16) {
    if (state == Dtype::f32) f.template operator()<bf16_t, float>();
    if (state == Dtype::bf16) f.template operator()<bf16_t, bf16_t>();
  } else {
    if (state == Dtype::f32) f.template operator()<fp16_t, float>();
    if (state == Dtype::bf16) f.template operator()<fp16_t, bf16_t>();
    if (state == Dtype::f16) f.template operator()<fp16_t, fp16_t>();
  }
}

// `tensors`: all of one parameter and state dtype; `at`: their places in the scalars.
template <class P, class S>
void launch_masked_adamw(const AdamwTensor* const* tensors, const int* at, int64_t count,
                         const AdamwOptions& o, const AdamwScalars* scalars, cudaStream_t stream) {
  for_each_table(tensors, at, count, kAdamwChunk<P>,
                 [&](const AdamwTable<AdamwTensor>& table, int64_t chunks) {
                   TENFOLD_LAUNCH((masked_adamw_kernel<P, S>), static_cast<unsigned>(chunks),
                                  kAdamwThreads, stream, table, scalars, o);
                 });
}

}  // namespace tenfold::cuda
