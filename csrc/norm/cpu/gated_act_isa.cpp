// SPDX-License-Identifier: Apache-2.0
// See norm/gated_act.h.
#include "core/cpu/math.h"
#include "core/cpu/pairs.h"
#include "norm/gated_act.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kTwo = 2 * kWidth;
template <class T>
constexpr int64_t kAhead = kReadAhead / static_cast<int64_t>(sizeof(T));

// p(a), and p + a p'.
struct Part {
  VF p, slope;
};

template <Gate kGate>
inline Part part_of(VF a) {
  if constexpr (kGate == Gate::gelu) {
    const Normal n = normal(a);
    return {n.below, fma(a * set1(kInverseSqrt2Pi), n.bell, n.below)};
  } else if constexpr (kGate == Gate::gelu_tanh) {
    const VF square = vmin(set1(kGeluFar), a * a);  // a NaN is the second, so it survives
    const Logistic s = logistic(a * fma(square, set1(kGeluCube), set1(kGeluSlope)));
    const VF dv = fma(square, set1(3.0f * kGeluCube), set1(kGeluSlope));
    return {s.value, fma(a * dv, s.slope, s.value)};
  } else {
    const Logistic s = logistic(a);
    return {s.value, fma(a, s.slope, s.value)};
  }
}

// A span is asked for ahead, from its beginning to its end and not beyond: a short one has few
// lines for the hardware to learn from, and none to spare.
template <class T>
inline void read_first(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t end = n < kAhead<T> ? n : kAhead<T>;
  for (int64_t i = 0; i < end; i += kLine) __builtin_prefetch(p + i, 0, 3);
}

template <class T, Gate kGate>
void forward(const GatedSpan& s) {
  const T *const a = static_cast<const T*>(s.a), *const b = static_cast<const T*>(s.b);
  T* const out = static_cast<T*>(s.out);
  const bool past = s.past_caches && is_aligned(out);
  read_first(a, s.n);
  read_first(b, s.n);
  int64_t i = 0;
  for (; i + kTwo <= s.n; i += kTwo) {
    VF x[2], y[2];
    if (i + kAhead<T> < s.n) {
      read_ahead<kTwo>(a + i);
      read_ahead<kTwo>(b + i);
    }
    get_two<false>(a + i, x);
    get_two<false>(b + i, y);
    for (int k = 0; k < 2; ++k) x[k] = x[k] * part_of<kGate>(x[k]).p * y[k];
    put_two<false>(out + i, x, past);
  }
  for (; i < s.n; i += kWidth) {
    const int n = static_cast<int>(s.n - i < kWidth ? s.n - i : kWidth);
    const VF x = load_n(a + i, n);
    store_n(out + i, x * part_of<kGate>(x).p * load_n(b + i, n), n);
  }
  if (past) stream_fence();
}

template <class T, Gate kGate, bool kDa, bool kDb>
void backward(const GatedGradSpan& s) {
  const T *const a = static_cast<const T*>(s.a), *const b = static_cast<const T*>(s.b);
  const T* const dout = static_cast<const T*>(s.dout);
  T *const da = static_cast<T*>(s.da), *const db = static_cast<T*>(s.db);
  const bool past_a = s.past_caches && is_aligned(da), past_b = s.past_caches && is_aligned(db);
  read_first(a, s.n);
  read_first(dout, s.n);
  if constexpr (kDa) read_first(b, s.n);
  int64_t i = 0;
  for (; i + kTwo <= s.n; i += kTwo) {
    VF x[2], g[2], y[2], of_a[2], of_b[2];
    if (i + kAhead<T> < s.n) {
      read_ahead<kTwo>(a + i);
      read_ahead<kTwo>(dout + i);
      if constexpr (kDa) read_ahead<kTwo>(b + i);
    }
    get_two<false>(a + i, x);
    get_two<false>(dout + i, g);
    if constexpr (kDa) get_two<false>(b + i, y);
    for (int k = 0; k < 2; ++k) {
      const Part part = part_of<kGate>(x[k]);
      if constexpr (kDa) of_a[k] = g[k] * y[k] * part.slope;
      if constexpr (kDb) of_b[k] = g[k] * (x[k] * part.p);
    }
    if constexpr (kDa) put_two<false>(da + i, of_a, past_a);
    if constexpr (kDb) put_two<false>(db + i, of_b, past_b);
  }
  for (; i < s.n; i += kWidth) {
    const int n = static_cast<int>(s.n - i < kWidth ? s.n - i : kWidth);
    const VF x = load_n(a + i, n), g = load_n(dout + i, n);
    const Part part = part_of<kGate>(x);
    if constexpr (kDa) store_n(da + i, g * load_n(b + i, n) * part.slope, n);
    if constexpr (kDb) store_n(db + i, g * (x * part.p), n);
  }
  if (s.past_caches) stream_fence();
}

// f(type, gate)
template <class T, class F>
inline void with_gate(Gate gate, const F& f) {
  if (gate == Gate::silu) return f.template operator()<T, Gate::silu>();
  if (gate == Gate::gelu_tanh) return f.template operator()<T, Gate::gelu_tanh>();
  f.template operator()<T, Gate::gelu>();
}
template <class F>
inline void with_kinds(Dtype dtype, Gate gate, const F& f) {
  if (dtype == Dtype::f32) return with_gate<float>(gate, f);
  if (dtype == Dtype::bf16) return with_gate<bf16_t>(gate, f);
  with_gate<fp16_t>(gate, f);
}

}  // namespace

void gated_act(const GatedSpan& s) {
  with_kinds(s.dtype, s.gate, [&]<class T, Gate kGate>() { forward<T, kGate>(s); });
}

void gated_act_grad(const GatedGradSpan& s) {
  with_kinds(s.dtype, s.gate, [&]<class T, Gate kGate>() {
    if (s.db == nullptr) return backward<T, kGate, true, false>(s);
    if (s.da == nullptr) return backward<T, kGate, false, true>(s);
    backward<T, kGate, true, true>(s);
  });
}

TENFOLD_ISA_END
