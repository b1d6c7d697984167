// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated kernels of `merge`, for ctypes. The launch code is the kernels'
// own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "merge/cuda/delta_merge_kernel.cuh"
#include "merge/cuda/gram_kernel.cuh"
#include "merge/cuda/norms_kernel.cuh"
#include "merge/cuda/ties_kernel.cuh"

namespace {

// t: base out expert...; numbers of experts in w: weight share drop number, each [experts].
// n: dtype numel experts elect normalize random, then seed stream offset
DeltaMerge delta_merge_of(void* const* t, const double* w, double lambda, const int64_t* n) {
  DeltaMerge m{};
  m.base = t[0], m.out = t[1], m.dtype = static_cast<Dtype>(n[0]);
  m.experts = static_cast<int>(n[2]), m.elect = n[3] != 0, m.normalize = n[4] != 0;
  m.pick = n[5] != 0 ? Pick::random : Pick::all;
  m.lambda = static_cast<float>(lambda);
  m.key = drop_key(n[6], n[7]), m.offset = n[8];
  for (int e = 0; e < m.experts; ++e) {
    m.expert[e] = t[2 + e];
    m.weight[e] = static_cast<float>(w[e]);
    m.share[e] = static_cast<float>(w[m.experts + e]);
    m.drop[e] = drop_limit(w[2 * m.experts + e]);
    m.number[e] = static_cast<uint32_t>(w[3 * m.experts + e]);
  }
  return m;
}

template <class F>
void with_dtype_of(Dtype dtype, F f) {
  with_dtype(static_cast<int64_t>(dtype), f);
}

}  // namespace

// norm: 0 none, 1 l1, 2 l2
API void emu_delta_merge(void* const* t, const double* w, double lambda, int64_t norm,
                         const int64_t* n) {
  const DeltaMerge m = delta_merge_of(t, w, lambda, n);
  with_dtype_of(m.dtype, [&]<class T>() {
    NormsArgs norms = norms_args(delta_run(m, n[1], nullptr), norm == 2);
    std::vector<double> parts(norms.blocks * m.experts * 2, NAN);
    std::vector<float> weight(m.experts, NAN);
    norms.parts = parts.data(), norms.weight = weight.data();
    if (norm != 0) launch_norms<T>(norms, nullptr);
    launch_delta_merge<T>(delta_run(m, n[1], norm != 0 ? weight.data() : nullptr), nullptr);
  });
}

API void emu_ties_merge(void* const* t, const double* w, double lambda, const int64_t* kept,
                        const int64_t* n) {
  DeltaMerge m = delta_merge_of(t, w, lambda, n);
  m.pick = Pick::largest;
  TiesArgs a = ties_args(m, n[1], kept);
  std::vector<RadixState> state(m.experts);
  std::memset(static_cast<void*>(state.data()), 0xCD, state.size() * sizeof(RadixState));
  std::vector<int64_t> ties(m.experts * a.tiles, 0x5A5A5A5A5A5A5A5A);
  a.state = state.data(), a.ties = ties.data();
  with_dtype_of(m.dtype, [&]<class T>() { launch_ties_merge<T>(a, nullptr); });
}

// t: out term.... n: dtype numel terms
API void emu_weighted_sum(void* const* t, const double* w, const int64_t* n) {
  WeightedSum m{};
  m.out = t[0], m.dtype = static_cast<Dtype>(n[0]), m.terms = static_cast<int>(n[2]);
  for (int e = 0; e < m.terms; ++e) {
    m.term[e] = t[1 + e];
    m.weight[e] = static_cast<float>(w[e]);
  }
  with_dtype_of(m.dtype, [&]<class T>() {
    launch_weighted_sum<T>(weighted_sum_args(m, n[1], nullptr), nullptr);
  });
}

namespace {

// t: base (or null) unused expert.... n: dtype numel experts
void gram_of(void* const* t, bool fresh, double* gram, const int64_t* n) {
  GramInput in{};
  in.base = t[0], in.dtype = static_cast<Dtype>(n[0]), in.experts = static_cast<int>(n[2]);
  for (int e = 0; e < in.experts; ++e) in.expert[e] = t[2 + e];
  GramArgs a = gram_args(in, n[1]);
  std::vector<double> parts(gram_doubles(a), NAN);
  a.parts = parts.data();
  with_dtype_of(in.dtype, [&]<class T>() { launch_gram<T>(a, fresh, gram, nullptr); });
}

}  // namespace

API void emu_gram(void* const* t, double* gram, const int64_t* n) {
  gram_of(t, false, gram, n);
}

// Two experts; out in place 1. x: t dot_threshold
API void emu_slerp(void* const* t, const double* x, const int64_t* n) {
  std::vector<double> gram(4, NAN);
  std::vector<float> weight(2, NAN);
  gram_of(t, true, gram.data(), n);
  launch_slerp_weights({x[0], x[1]}, gram.data(), weight.data(), nullptr);
  DeltaMerge m{};
  m.base = t[0], m.out = t[1], m.dtype = static_cast<Dtype>(n[0]), m.experts = 2;
  m.pick = Pick::all;
  WeightedSum s{};
  s.out = t[1], s.dtype = m.dtype, s.terms = 2;
  for (int e = 0; e < 2; ++e) s.term[e] = m.expert[e] = t[2 + e];
  with_dtype_of(m.dtype, [&]<class T>() {
    if (m.base != nullptr) return launch_delta_merge<T>(delta_run(m, n[1], weight.data()), nullptr);
    launch_weighted_sum<T>(weighted_sum_args(s, n[1], weight.data()), nullptr);
  });
}
