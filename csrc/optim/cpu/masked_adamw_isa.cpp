// SPDX-License-Identifier: Apache-2.0
// The SIMD kernel of masked_adamw_. Elements go through one of two loops: `span` updates a run of
// trained elements, `words` walks over 64 elements at a time with their mask bits, gives whole runs
// to `span`, skips what is frozen and does the rest lane by lane.
#include <type_traits>

#include "optim/cpu/adamw_vec.h"
#include "optim/cpu/mask_words.h"
#include "optim/masked_adamw.h"

TENFOLD_ISA_BEGIN
namespace {

// Shorter runs are not worth their ragged ends: they are updated lane by lane.
constexpr int64_t kShortestRun = 64;

// What the update of kWidth elements needs; loops take a copy, which no store can alias.
struct Rule {
  AdamwConstants<VecOps> c;
  VF divisor, factor;
  bool scaled, divides, with_max, stochastic, param_only;
};

inline Rule rule_of(const AdamwTensor& t, const AdamwScalars& s, const AdamwOptions& o) {
  return {adamw_constants<VecOps>(s),
          set1(s.divisor),
          set1(s.factor),
          s.divisor != 1.0f || s.factor != 1.0f,
          s.divides != 0,
          t.max_exp_avg_sq != nullptr,
          o.stochastic && t.dtype == Dtype::bf16,
          o.param_only};
}

template <class P, class S>
struct Task {
  P* p;
  const P* g;
  S *m, *v, *max;
  int64_t state_numel;
  Rule rule;
  Noise noise;
};

template <class P, class S>
inline Task<P, S> task_of(const AdamwTensor& t, const AdamwScalars& s, const AdamwOptions& o) {
  return {static_cast<P*>(t.param),
          static_cast<const P*>(t.grad),
          static_cast<S*>(t.exp_avg),
          static_cast<S*>(t.exp_avg_sq),
          static_cast<S*>(t.max_exp_avg_sq),
          t.state_numel,
          rule_of(t, s, o),
          Noise(o.seed, t.id, s.count)};
}

// The values of kWidth elements, or of the lanes that a mask gives.
struct Values {
  VF p, g, m, v, max;
};

// kPlain: no scaling of gradients, no maximum, no noise.
template <bool kPlain>
[[gnu::always_inline]] inline Values update(const Rule& r, Values x) {
  if (!kPlain && r.scaled) x.g = (r.divides ? x.g / r.divisor : x.g * r.divisor) * r.factor;
  adamw_moments<VecOps>(r.c, x.g, &x.m, &x.v);
  VF second = x.v;
  if (!kPlain && r.with_max) second = x.max = select(unordered(x.max), x.max, vmax(x.max, x.v));
  x.p = adamw_param<VecOps>(r.c, x.p, x.m, second);
  return x;
}

// With the stochastic rounding of elements i, i + 1, ...
template <bool kPlain>
[[gnu::always_inline]] inline Values update(const Rule& r, Noise& noise, int64_t i, Values x) {
  x = update<kPlain>(r, x);
  if (!kPlain && r.stochastic) x.p = round_stochastic(x.p, noise.at(i));
  return x;
}

// What lies `ahead` elements further, where dense states are trained next: runs of a block or a
// short row are too short for the hardware to see that coming. 0: nothing.
template <class P, class S>
[[gnu::always_inline]] inline void fetch(const Task<P, S>& k, int64_t i, int64_t ahead) {
  if (ahead == 0) return;
  __builtin_prefetch(k.p + i + ahead, 1, 2);
  __builtin_prefetch(k.g + i + ahead, 0, 2);
  __builtin_prefetch(k.m + i + ahead, 1, 2);
  __builtin_prefetch(k.v + i + ahead, 1, 2);
}

// All of p, g, m, v bf16: even and odd elements apart, as many whole pairs of vectors as fit into
// n. Conversions would cost as much as the update else. How many elements those are.
template <bool kPlain>
int64_t span_pairs(Task<bf16_t, bf16_t>& k, int64_t i, int64_t n, int64_t ahead) {
  const Rule r = k.rule;
  const bool with_max = !kPlain && r.with_max;
  int64_t j = i;
  for (; j + 2 * kWidth <= i + n; j += 2 * kWidth) {
    Values even, odd;
    fetch(k, j, ahead);
    load_pair(k.p + j, &even.p, &odd.p), load_pair(k.g + j, &even.g, &odd.g);
    load_pair(k.m + j, &even.m, &odd.m), load_pair(k.v + j, &even.v, &odd.v);
    if (with_max) load_pair(k.max + j, &even.max, &odd.max);
    even = update<kPlain>(r, even), odd = update<kPlain>(r, odd);
    if (!kPlain && r.stochastic) {
      const VI noise = k.noise.pair_at(j);
      even.p = round_stochastic(even.p, noise & seti(0xFFFFu));
      odd.p = round_stochastic(odd.p, shr<16>(noise));
    }
    store_pair(k.p + j, even.p, odd.p);
    store_pair(k.m + j, even.m, odd.m), store_pair(k.v + j, even.v, odd.v);
    if (with_max) store_pair(k.max + j, even.max, odd.max);
  }
  return j - i;
}

// `n` trained elements from i on; their states from `at` on. With noise, i is a multiple of 64.
template <bool kPlain, class P, class S>
void span(Task<P, S>& k, int64_t i, int64_t n, int64_t at, int64_t ahead = 0) {
  const Rule r = k.rule;
  const bool with_max = !kPlain && r.with_max;
  P* const p = k.p + i;
  const P* const g = k.g + i;
  S *const m = k.m + at, *const v = k.v + at, *const max = with_max ? k.max + at : nullptr;
  int64_t j = 0;
  if constexpr (std::is_same_v<P, bf16_t> && std::is_same_v<S, bf16_t>)
    if (at == i) j = span_pairs<kPlain>(k, i, n, ahead);
  for (; j + kWidth <= n; j += kWidth) {
    fetch(k, i + j, ahead);
    Values x{load(p + j), load(g + j), load(m + j), load(v + j), {}};
    if (with_max) x.max = load(max + j);
    x = update<kPlain>(r, k.noise, i + j, x);
    store_quick(p + j, x.p), store_quick(m + j, x.m), store_quick(v + j, x.v);
    if (with_max) store_quick(max + j, x.max);
  }
  if (j == n) return;
  const int left = static_cast<int>(n - j);
  Values x{load_n(p + j, left), load_n(g + j, left), load_n(m + j, left), load_n(v + j, left), {}};
  if (with_max) x.max = load_n(max + j, left);
  x = update<kPlain>(r, k.noise, i + j, x);
  store_n(p + j, x.p, left), store_n(m + j, x.m, left), store_n(v + j, x.v, left);
  if (with_max) store_n(max + j, x.max, left);
}

enum class Layout { dense, compact };

// Where kWidth elements and their states lie.
template <class P, class S>
struct Place {
  P* p;
  const P* g;
  S *m, *v, *max;
};

// Compact states of the lanes of `on`, `count` of them; `room`: kWidth can be read.
template <class S>
inline VF load_compact(const S* from, VM on, int count, bool room) {
  return expand(on, room ? load(from) : load_n(from, count));
}

// kWidth elements from i on, of which those of `word`'s low bits are trained.
template <bool kPlain, Layout kLayout, class P, class S>
[[gnu::always_inline]] inline void lanes(const Rule& r, Noise& noise, const Place<P, S>& at,
                                         int64_t i, uint32_t word, bool room) {
  const VM on = lanes_of(word);
  const bool with_max = !kPlain && r.with_max;
  Values x{load(at.p), load(at.g), {}, {}, {}};
  if constexpr (kLayout == Layout::compact) {
    const int count = __builtin_popcount(word);
    x.m = load_compact(at.m, on, count, room);
    x.v = load_compact(at.v, on, count, room);
    if (with_max) x.max = load_compact(at.max, on, count, room);
    x = update<kPlain>(r, noise, i, x);
    store_n(at.m, compress(on, x.m), count);
    store_n(at.v, compress(on, x.v), count);
    if (with_max) store_n(at.max, compress(on, x.max), count);
  } else {
    x.m = load(at.m), x.v = load(at.v);
    if (with_max) x.max = load(at.max);
    x = update<kPlain>(r, noise, i, x);
    const VM kept = !kPlain && r.param_only ? lanes_of(~0u) : on;
    store_where(at.m, kept, x.m);
    store_where(at.v, kept, x.v);
    if (with_max) store_where(at.max, kept, x.max);
  }
  store_where(at.p, on, x.p);
}

// The last n elements of a tensor, fewer than kWidth: `lanes` on a copy.
template <bool kPlain, Layout kLayout, class P, class S>
void last_lanes(const Rule& r, Noise& noise, const Place<P, S>& at, int64_t i, uint32_t word,
                int n) {
  P p[kWidth] = {}, g[kWidth] = {};
  S state[3][kWidth] = {};
  const size_t bytes = n * sizeof(P);
  const size_t state_bytes = (kLayout == Layout::dense ? n : __builtin_popcount(word)) * sizeof(S);
  S* const states[3] = {at.m, at.v, at.max};
  memcpy(p, at.p, bytes);
  memcpy(g, at.g, bytes);
  for (int s = 0; s < 3; ++s)
    if (states[s] != nullptr) memcpy(state[s], states[s], state_bytes);
  const Place<P, S> copy{p, g, state[0], state[1], state[2]};
  lanes<kPlain, kLayout>(r, noise, copy, i, word, true);
  memcpy(at.p, p, bytes);
  for (int s = 0; s < 3; ++s)
    if (states[s] != nullptr) memcpy(states[s], state[s], state_bytes);
}

// 64 elements (fewer at the end of the tensor) from i on; states of trained ones from `at` on.
template <bool kPlain, Layout kLayout, class P, class S>
[[gnu::always_inline]] inline void mixed_word(Task<P, S>& k, const Rule& r, int64_t i, int n,
                                              uint64_t word, int64_t at) {
  const bool everywhere = !kPlain && r.param_only;
  for (int j = 0; j < n; j += kWidth) {
    const auto bits = static_cast<uint32_t>(word >> j) & static_cast<uint32_t>(low_bits(kWidth));
    if (bits == 0 && !everywhere) continue;
    const int64_t state = kLayout == Layout::dense ? i + j : at;
    const Place<P, S> place{k.p + i + j, k.g + i + j, k.m + state, k.v + state,
                            k.max == nullptr ? nullptr : k.max + state};
    if (j + kWidth <= n) {
      lanes<kPlain, kLayout>(r, k.noise, place, i + j, bits, state + kWidth <= k.state_numel);
    } else {
      last_lanes<kPlain, kLayout>(r, k.noise, place, i + j, bits, n - j);
    }
    at += __builtin_popcount(bits);
  }
}

template <bool kPlain, Layout kLayout, class P, class S>
void words(Task<P, S>& k, const AdamwTensor& t, int64_t begin, int64_t end, int64_t at) {
  const Rule r = k.rule;
  MaskWords mask(t.mask, t.numel, begin);
  int64_t run = begin, run_at = at;  // trained elements [run, i), not updated yet
  const auto flush = [&](int64_t i) {
    if (i > run) span<kPlain>(k, run, i - run, kLayout == Layout::dense ? run : run_at);
  };
  for (int64_t i = begin; i < end; i += 64) {
    const uint64_t word = mask.next();
    const int n = static_cast<int>(end - i < 64 ? end - i : 64);
    const int trained = __builtin_popcountll(word);
    if (trained != n) {
      flush(i);
      if (trained != 0 || (!kPlain && r.param_only))
        mixed_word<kPlain, kLayout>(k, r, i, n, word, at);
      run = i + n, run_at = at + trained;
    }
    at += trained;
  }
  flush(end);
}

// Rows or blocks as runs of neighbours that train; each is updated when the next one is known.
template <bool kPlain, class P, class S>
void runs(Task<P, S>& k, const AdamwTensor& t, int64_t begin, int64_t end, int64_t at) {
  constexpr int64_t kLongRun = 4096;  // whose end the hardware has long caught up with
  const int64_t inner = t.mask.inner;
  int64_t first = 0, last = 0;  // trained elements [first, last), not updated yet
  const auto flush = [&](int64_t next) {
    const int64_t n = last - first;
    const bool fetches = t.prefix == nullptr && next > first && n <= kLongRun;
    if (n > 0) span<kPlain>(k, first, n, at, fetches ? next - first : 0);
    at += n;
  };
  for (int64_t unit = begin / inner, i = begin; i < end; ++unit) {
    const int64_t stop = (unit + 1) * inner < end ? (unit + 1) * inner : end;
    if (mask_bit(t.mask.bits, unit)) {
      if (last < i) {
        flush(i);
        first = i;
        if (t.prefix == nullptr) at = i;
      }
      last = stop;
    }
    i = stop;
  }
  flush(0);
}

template <bool kPlain, class P, class S>
void choose_loop(const AdamwTensor& t, const AdamwScalars& s, const AdamwOptions& o, int64_t begin,
                 int64_t end) {
  auto k = task_of<P, S>(t, s, o);
  const int64_t at = adamw_state_position(t, begin);
  const bool units = t.mask.kind == MaskKind::row || t.mask.kind == MaskKind::block;
  if (t.mask.kind == MaskKind::none) {
    span<kPlain>(k, begin, end - begin, at);
  } else if (units && t.mask.inner >= kShortestRun && !k.rule.stochastic && !k.rule.param_only) {
    runs<kPlain>(k, t, begin, end, at);
  } else if (t.prefix != nullptr) {
    words<false, Layout::compact>(k, t, begin, end, at);
  } else {
    words<kPlain, Layout::dense>(k, t, begin, end, at);
  }
}

template <class P, class S>
void run(const AdamwTensor& t, const AdamwScalars& s, const AdamwOptions& o, int64_t begin,
         int64_t end) {
  const bool plain = s.divisor == 1.0f && s.factor == 1.0f && t.max_exp_avg_sq == nullptr &&
                     !o.param_only && !(o.stochastic && t.dtype == Dtype::bf16);
  if (plain) {
    choose_loop<true, P, S>(t, s, o, begin, end);
  } else {
    choose_loop<false, P, S>(t, s, o, begin, end);
  }
}

}  // namespace

void masked_adamw_range(const AdamwTensor& t, const AdamwScalars& s, const AdamwOptions& o,
                        int64_t begin, int64_t end) {
  const auto with = [&]<class P>() {
    if (t.state_dtype == Dtype::f32) run<P, float>(t, s, o, begin, end);
    if (t.state_dtype == Dtype::bf16) run<P, bf16_t>(t, s, o, begin, end);
    if constexpr (std::is_same_v<P, fp16_t>)
      if (t.state_dtype == Dtype::f16) run<P, fp16_t>(t, s, o, begin, end);
  };
  if (t.dtype == Dtype::f32) with.template operator()<float>();
  if (t.dtype == Dtype::bf16) with.template operator()<bf16_t>();
  if (t.dtype == Dtype::f16) with.template operator()<fp16_t>();
}

TENFOLD_ISA_END
