// The SIMD kernel of masked_adamw_. Elements go through one of two loops: `span` updates a run of
// trained elements, `words` walks over 64 elements at a time with their mask bits, gives whole runs
// to `span`, skips what is frozen and does the rest lane by lane.
#include <type_traits>

#include "core/cpu/math.h"
#include "core/cpu/vec.h"
#include "optim/cpu/mask_words.h"
#include "optim/masked_adamw.h"

TENFOLD_ISA_BEGIN
namespace {

struct VecOps {
  using F = VF;
  static inline VF set1(float x) { return TENFOLD_ISA::set1(x); }
  static inline VF add(VF a, VF b) { return a + b; }
  static inline VF sub(VF a, VF b) { return a - b; }
  static inline VF mul(VF a, VF b) { return a * b; }
  static inline VF div(VF a, VF b) { return a / b; }
  static inline VF sqrt(VF a) { return TENFOLD_ISA::sqrt(a); }
  static inline VF fma(VF a, VF b, VF c) { return fused(a, b, c); }
  static inline VF fma_from(VF c, VF a, VF b) { return fused_from(c, a, b); }
  static inline VF finite(VF q, VF otherwise) {
    return select(lt(q, from_bits(seti(0x7F800000u))), otherwise, q);
  }
};

// Shorter runs are not worth their ragged ends: they are updated lane by lane.
constexpr int64_t kShortestRun = 64;

// Uniform random 16 bits of every element, for 8 kWidth elements at a time.
class Noise {
 public:
  static constexpr int64_t kElements = 8 * kWidth;

  Noise(uint64_t seed, uint32_t id, uint32_t step)
      : key0_(static_cast<uint32_t>(seed)),
        key1_(static_cast<uint32_t>(seed >> 32)),
        id_(id),
        step_(step) {}

  // Those of element i, a multiple of kWidth, and of the kWidth - 1 after it.
  inline VI at(int64_t i) {
    const int64_t first = i / kElements * kElements;
    if (first != first_) draw(first_ = first);
    return load_halves(reinterpret_cast<const uint16_t*>(words_) + (i - first));
  }

 private:
  void draw(int64_t first) {
    const uint64_t counter = static_cast<uint64_t>(first) >> 3;  // its low bits are zero: no carry
    alignas(64) uint32_t dealt[kWidth];
    for (int l = 0; l < kWidth; ++l)
      dealt[l] = static_cast<uint32_t>(counter) + (l % 4) * (kWidth / 4) + l / 4;
    VI c0 = load(dealt), c1 = seti(static_cast<uint32_t>(counter >> 32)), c2 = seti(id_),
       c3 = seti(step_);
    uint32_t k0 = key0_, k1 = key1_;
    for (int round = 0; round < 10; ++round) {
      VI hi0, lo0, hi1, lo1;
      mulhilo(c0, kPhiloxMul0, &hi0, &lo0);
      mulhilo(c2, kPhiloxMul1, &hi1, &lo1);
      c0 = hi1 ^ c1 ^ seti(k0);
      c1 = lo1;
      c2 = hi0 ^ c3 ^ seti(k1);
      c3 = lo0;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    store_by_four(words_, c0, c1, c2, c3);
  }

  const uint32_t key0_, key1_, id_, step_;
  int64_t first_ = -1;
  alignas(64) uint32_t words_[4 * kWidth];
};

// x rounded to bf16 up or down with the chance of its distance; Inf and NaN stay.
inline VF round_stochastic(VF x, VI noise) {
  const VI b = bits(x), exponent = seti(0x7F800000u);
  const VI rounded = (b + noise) & seti(0xFFFF0000u);
  return from_bits(select(eq(b & exponent, exponent), b, rounded));
}

template <class P, class S>
struct Task {
  P* p;
  const P* g;
  S *m, *v, *max;
  int64_t state_numel;
  AdamwConstants<VF> c;
  VF divisor, factor;
  bool scaled, divides, stochastic, param_only;
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
          adamw_constants<VecOps>(s),
          set1(s.divisor),
          set1(s.factor),
          s.divisor != 1.0f || s.factor != 1.0f,
          s.divides != 0,
          o.stochastic && t.dtype == Dtype::bf16,
          o.param_only,
          Noise(o.seed, t.id, s.count)};
}

// The values of kWidth elements, or of the lanes that a mask gives.
struct Values {
  VF p, g, m, v, max;
};

// kPlain: no scaling of gradients, no maximum, no noise.
template <bool kPlain, class P, class S>
inline void update(Task<P, S>& k, const AdamwConstants<VF>& c, int64_t i, Values* x) {
  if (!kPlain && k.scaled) x->g = (k.divides ? x->g / k.divisor : x->g * k.divisor) * k.factor;
  adamw_moments<VecOps>(c, x->g, &x->m, &x->v);
  VF second = x->v;
  if (!kPlain && k.max != nullptr)
    second = x->max = select(unordered(x->max), x->max, vmax(x->max, x->v));
  x->p = adamw_param<VecOps>(c, x->p, x->m, second);
  if (!kPlain && k.stochastic) x->p = round_stochastic(x->p, k.noise.at(i));
}

// `n` trained elements from i on; their states from `at` on. With noise, i is a multiple of 64.
template <bool kPlain, class P, class S>
inline void span(Task<P, S>& k, int64_t i, int64_t n, int64_t at) {
  P* const p = k.p + i;
  const P* const g = k.g + i;
  S *const m = k.m + at, *const v = k.v + at;
  S* const max = k.max + (kPlain || k.max == nullptr ? 0 : at);
  const AdamwConstants<VF> c = k.c;  // a copy that no store can alias stays in registers
  Values x;
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    x.p = load(p + j), x.g = load(g + j), x.m = load(m + j), x.v = load(v + j);
    if (!kPlain && k.max != nullptr) x.max = load(max + j);
    update<kPlain>(k, c, i + j, &x);
    store(p + j, x.p), store(m + j, x.m), store(v + j, x.v);
    if (!kPlain && k.max != nullptr) store(max + j, x.max);
  }
  if (j == n) return;
  const int left = static_cast<int>(n - j);
  x.p = load_n(p + j, left), x.g = load_n(g + j, left);
  x.m = load_n(m + j, left), x.v = load_n(v + j, left);
  if (!kPlain && k.max != nullptr) x.max = load_n(max + j, left);
  update<kPlain>(k, c, i + j, &x);
  store_n(p + j, x.p, left), store_n(m + j, x.m, left), store_n(v + j, x.v, left);
  if (!kPlain && k.max != nullptr) store_n(max + j, x.max, left);
}

enum class Layout { dense, compact };

// Up to kWidth values of compact states from `at` on, to the lanes of `lanes`.
template <class S>
inline VF load_compact(const S* from, int64_t at, int64_t numel, VM lanes, int count) {
  return expand(lanes, at + kWidth <= numel ? load(from + at) : load_n(from + at, count));
}

// kWidth elements, of which those of `word`'s low bits are trained.
template <bool kPlain, Layout kLayout, class P, class S>
inline void lanes(Task<P, S>& k, int64_t i, uint32_t word, int64_t at) {
  const VM on = lanes_of(word);
  const bool with_max = !kPlain && k.max != nullptr;
  const AdamwConstants<VF> c = k.c;
  Values x;
  x.p = load(k.p + i), x.g = load(k.g + i);
  if constexpr (kLayout == Layout::compact) {
    const int count = __builtin_popcount(word);
    x.m = load_compact(k.m, at, k.state_numel, on, count);
    x.v = load_compact(k.v, at, k.state_numel, on, count);
    if (with_max) x.max = load_compact(k.max, at, k.state_numel, on, count);
    update<kPlain>(k, c, i, &x);
    store_n(k.m + at, compress(on, x.m), count);
    store_n(k.v + at, compress(on, x.v), count);
    if (with_max) store_n(k.max + at, compress(on, x.max), count);
  } else {
    x.m = load(k.m + i), x.v = load(k.v + i);
    if (with_max) x.max = load(k.max + i);
    update<kPlain>(k, c, i, &x);
    const VM kept = !kPlain && k.param_only ? lanes_of(~0u) : on;
    store_where(k.m + i, kept, x.m);
    store_where(k.v + i, kept, x.v);
    if (with_max) store_where(k.max + i, kept, x.max);
  }
  store_where(k.p + i, on, x.p);
}

// The last elements of a tensor, fewer than kWidth: `lanes` on a copy.
template <bool kPlain, Layout kLayout, class P, class S>
inline void last_lanes(Task<P, S>& k, int64_t i, int n, uint32_t word, int64_t at) {
  P p[kWidth] = {}, g[kWidth] = {};
  S state[3][kWidth] = {};
  constexpr bool kDense = kLayout == Layout::dense;
  const int states = kDense ? n : __builtin_popcount(word);
  S* const from[3] = {k.m, k.v, k.max};
  const int64_t first = kDense ? i : at;
  memcpy(p, k.p + i, n * sizeof(P));
  memcpy(g, k.g + i, n * sizeof(P));
  for (int s = 0; s < 3; ++s)
    if (from[s] != nullptr) memcpy(state[s], from[s] + first, states * sizeof(S));
  Task<P, S> copy = k;
  // The noise is that of element i, so positions stay and pointers are moved.
  copy.p = p - i, copy.g = g - i;
  copy.m = state[0] - first, copy.v = state[1] - first;
  copy.max = k.max == nullptr ? nullptr : state[2] - first;
  copy.state_numel = first + kWidth;
  lanes<kPlain, kLayout>(copy, i, word, at);
  memcpy(k.p + i, p, n * sizeof(P));
  for (int s = 0; s < 3; ++s)
    if (from[s] != nullptr) memcpy(from[s] + first, state[s], states * sizeof(S));
}

template <bool kPlain, Layout kLayout, class P, class S>
void words(Task<P, S>& k, const AdamwTensor& t, int64_t begin, int64_t end, int64_t at) {
  MaskWords mask(t.mask, t.numel, begin);
  const bool everywhere = !kPlain && k.param_only;
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
      if (trained != 0 || everywhere) {
        int64_t state = at;
        for (int j = 0; j < n; j += kWidth) {
          const auto bits =
              static_cast<uint32_t>(word >> j) & static_cast<uint32_t>(low_bits(kWidth));
          if (bits == 0 && !everywhere) continue;
          if (j + kWidth <= n) {
            lanes<kPlain, kLayout>(k, i + j, bits, state);
          } else {
            last_lanes<kPlain, kLayout>(k, i + j, n - j, bits, state);
          }
          state += __builtin_popcount(bits);
        }
      }
      run = i + n, run_at = at + trained;
    }
    at += trained;
  }
  flush(end);
}

// Rows or blocks as runs of neighbours that train.
template <bool kPlain, class P, class S>
void runs(Task<P, S>& k, const AdamwTensor& t, int64_t begin, int64_t end, int64_t at) {
  const int64_t inner = t.mask.inner;
  int64_t run = begin;  // trained elements [run, i), not updated yet
  for (int64_t unit = begin / inner, i = begin; i < end; ++unit) {
    const int64_t next = (unit + 1) * inner < end ? (unit + 1) * inner : end;
    if (!mask_bit(t.mask.bits, unit)) {
      if (i > run) {
        span<kPlain>(k, run, i - run, at);
        at += i - run;
      }
      run = next;
      if (t.prefix == nullptr) at = next;
    }
    i = next;
  }
  if (end > run) span<kPlain>(k, run, end - run, at);
}

// Where the states of element i stand, if it trains: of the first trained one from i on.
int64_t state_position(const AdamwTensor& t, int64_t i) {
  if (t.prefix == nullptr) return i;
  const Mask& mask = t.mask;
  const int64_t unit = mask.kind == MaskKind::element ? i
                       : mask.kind == MaskKind::col   ? i % mask.inner
                                                      : i / mask.inner;
  const int64_t rank = mask_rank(mask.bits, t.prefix, unit, kPrefixBlock);
  if (mask.kind == MaskKind::element) return rank;
  if (mask.kind == MaskKind::col) return i / mask.inner * t.col_trained + rank;
  return rank * mask.inner + (mask_bit(mask.bits, unit) ? i % mask.inner : 0);
}

template <bool kPlain, class P, class S>
void choose_loop(const AdamwTensor& t, const AdamwScalars& s, const AdamwOptions& o, int64_t begin,
                 int64_t end) {
  auto k = task_of<P, S>(t, s, o);
  const int64_t at = state_position(t, begin);
  const bool units = t.mask.kind == MaskKind::row || t.mask.kind == MaskKind::block;
  if (t.mask.kind == MaskKind::none) {
    span<kPlain>(k, begin, end - begin, at);
  } else if (units && t.mask.inner >= kShortestRun && !k.stochastic && !k.param_only) {
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
