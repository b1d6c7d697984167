// SPDX-License-Identifier: Apache-2.0
// See diffusion/vdiff.h.
#include "core/cpu/math.h"
#include "core/cpu/pairs.h"
#include "diffusion/vdiff.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kTwo = 2 * kWidth;
constexpr int64_t kDrawn = 4 * kWidth;  // positions of a vector of counters

// normals_of, lane by lane and bit for bit.
inline void normals_of(VI first, VI second, VF* x, VF* y) {
  const VF high = to_float(shr<16>(first)), low = to_float(first & seti(0xFFFFu));
  const VF u = high * set1(1.52587890625e-5f) + (low + set1(0.5f)) * set1(2.3283064365386963e-10f);
  const VF root = sqrt(det_log_normal(u) * set1(-2.0f));
  const VF radius = from_bits(bits(root) ^ (second & seti(0x80000000u)));
  const VI doubled = second + second;
  const VF g = to_float(doubled + doubled) * set1(2.3283064365386963e-10f), square = g * g;
  VF c = fused(set1(kCos8), square, set1(kCos6)), s = fused(set1(kSin9), square, set1(kSin7));
  c = fused(fused(c, square, set1(kCos4)), square, set1(kCos2));
  c = fused(c, square, set1(1.0f));
  s = fused(fused(s, square, set1(kSin5)), square, set1(kSin3));
  s = fused(s, square, set1(kSin1));
  s = s * g;
  const VM swap = lt(doubled, seti(0));
  *x = radius * select(swap, s, c);
  *y = radius * select(swap, c, s);
}

// Bits of the numbers of positions from `position`, a multiple of kDrawn, on.
inline void draw(const NoiseStream& stream, VI lanes, int64_t position, uint32_t (&out)[kDrawn]) {
  const auto at = static_cast<uint64_t>(position) / 4;
  VI w[4] = {lanes + seti(static_cast<uint32_t>(at)), seti(static_cast<uint32_t>(at >> 32)),
             seti(static_cast<uint32_t>(stream.offset)),
             seti(static_cast<uint32_t>(stream.offset >> 32))};
  philox_rounds(w, static_cast<uint32_t>(stream.seed), static_cast<uint32_t>(stream.seed >> 32));
  VF e[4];
  normals_of(w[0], w[1], &e[0], &e[1]);
  normals_of(w[2], w[3], &e[2], &e[3]);
  store_by_four(out, bits(e[0]), bits(e[1]), bits(e[2]), bits(e[3]));
}

struct Mix {
  VF a, s;
  inline VF z(VF x, VF e) const { return fma(s, e, a * x); }
  inline VF v(VF x, VF e) const { return fma(a, e, set1(0.0f) - s * x); }
};

// n elements of the drawn noise e at i of the span.
template <class T>
inline void mix_some(const NoiseSpan& s, const Mix& mix, const uint32_t* e, int64_t i, int64_t n) {
  for (int64_t j = 0; j < n; j += kWidth) {
    const int some = static_cast<int>(n - j < kWidth ? n - j : kWidth);
    const VF x = load_n(static_cast<const T*>(s.x0) + i + j, some);
    const VF of = from_bits(load_n(e + j, some));
    if (s.z != nullptr) store_n(static_cast<T*>(s.z) + i + j, mix.z(x, of), some);
    if (s.v != nullptr) store_n(static_cast<T*>(s.v) + i + j, mix.v(x, of), some);
  }
}

template <class T>
inline void mix_two(const NoiseSpan& s, const Mix& mix, const VF (&e)[2], int64_t i, bool z_past,
                    bool v_past) {
  VF x[2], made[2];
  get_next_two<true>(static_cast<const T*>(s.x0) + i, x);
  if (s.z != nullptr) {
    for (int k = 0; k < 2; ++k) made[k] = mix.z(x[k], e[k]);
    put_two<true>(static_cast<T*>(s.z) + i, made, z_past);
  }
  if (s.v != nullptr) {
    for (int k = 0; k < 2; ++k) made[k] = mix.v(x[k], e[k]);
    put_two<true>(static_cast<T*>(s.v) + i, made, v_past);
  }
}

template <class T>
void drawn(const NoiseSpan& s) {
  const Mix mix{set1(s.a), set1(s.s)};
  const VI lanes = counter_lanes();
  alignas(64) uint32_t e[kDrawn];
  const int64_t ahead = s.position % kDrawn;
  int64_t i = 0;
  if (ahead != 0) {
    const int64_t n = s.n < kDrawn - ahead ? s.n : kDrawn - ahead;
    draw(s.stream, lanes, s.position - ahead, e);
    mix_some<T>(s, mix, e + ahead, 0, n);
    i = n;
  }
  const auto past = [&](void* p) {
    return s.past_caches && p != nullptr && is_aligned(static_cast<T*>(p) + i);
  };
  const bool z_past = past(s.z), v_past = past(s.v);
  for (; i + kDrawn <= s.n; i += kDrawn) {
    draw(s.stream, lanes, s.position + i, e);
    for (int64_t j = 0; j < kDrawn; j += kTwo) {
      const VF two[2] = {from_bits(load(e + j)), from_bits(load(e + j + kWidth))};
      mix_two<T>(s, mix, two, i + j, z_past, v_past);
    }
  }
  if (i < s.n) {
    draw(s.stream, lanes, s.position + i, e);
    mix_some<T>(s, mix, e, i, s.n - i);
  }
  if (z_past || v_past) stream_fence();
}

template <class T>
void given(const NoiseSpan& s) {
  const Mix mix{set1(s.a), set1(s.s)};
  const T* const noise = static_cast<const T*>(s.noise);
  const bool z_past = s.past_caches && s.z != nullptr && is_aligned(s.z);
  const bool v_past = s.past_caches && s.v != nullptr && is_aligned(s.v);
  int64_t i = 0;
  for (; i + kTwo <= s.n; i += kTwo) {
    VF e[2];
    get_next_two<true>(noise + i, e);
    mix_two<T>(s, mix, e, i, z_past, v_past);
  }
  for (; i < s.n; i += kWidth) {
    const int n = static_cast<int>(s.n - i < kWidth ? s.n - i : kWidth);
    const VF x = load_n(static_cast<const T*>(s.x0) + i, n), e = load_n(noise + i, n);
    if (s.z != nullptr) store_n(static_cast<T*>(s.z) + i, mix.z(x, e), n);
    if (s.v != nullptr) store_n(static_cast<T*>(s.v) + i, mix.v(x, e), n);
  }
  if (z_past || v_past) stream_fence();
}

template <class T, class V, bool kGrad>
double loss(const LossSpan& s) {
  const T *const x0 = static_cast<const T*>(s.x0), *const noise = static_cast<const T*>(s.noise);
  const V* const v_hat = static_cast<const V*>(s.v_hat);
  V* const grad = static_cast<V*>(s.grad);
  const Mix mix{set1(s.a), set1(s.s)};
  const VF factor = set1(s.factor);
  const bool past = kGrad && s.past_caches && is_aligned(grad);
  VF sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  const auto two = [&](int64_t i, VF* into) {
    VF x[2], e[2], w[2];
    get_next_two<true>(x0 + i, x);
    get_next_two<true>(noise + i, e);
    get_next_two<true>(v_hat + i, w);
    for (int k = 0; k < 2; ++k) {
      const VF d = w[k] - mix.v(x[k], e[k]);
      if constexpr (kGrad) {
        w[k] = d * factor;
      } else {
        into[k] = fma(d, d, into[k]);
      }
    }
    if constexpr (kGrad) put_two<true>(grad + i, w, past);
  };
  int64_t i = 0;
  for (; i + 2 * kTwo <= s.n; i += 2 * kTwo) {
    two(i, sum);
    two(i + kTwo, sum + 2);
  }
  for (; i < s.n; i += kWidth) {
    const int n = static_cast<int>(s.n - i < kWidth ? s.n - i : kWidth);
    const VF d = load_n(v_hat + i, n) - mix.v(load_n(x0 + i, n), load_n(noise + i, n));
    if constexpr (kGrad) {
      store_n(grad + i, d * factor, n);
    } else {
      sum[0] = fma(d, d, sum[0]);
    }
  }
  if (past) stream_fence();
  return kGrad ? 0.0 : hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T, class V, bool kGuided, bool kGeneral>
void step(const StepSpan& s) {
  const T *const z = static_cast<const T*>(s.z), *const noise = static_cast<const T*>(s.noise);
  const V *const v = static_cast<const V*>(s.v), *const free = static_cast<const V*>(s.v_uncond);
  T *const z_next = static_cast<T*>(s.z_next), *const x0 = static_cast<T*>(s.x0_hat);
  const bool z_past = s.past_caches && is_aligned(z_next);
  const bool x_past = s.past_caches && x0 != nullptr && is_aligned(x0);
  const VF a = set1(s.a), minus_s = set1(-s.s), kx = set1(s.kx), kz = set1(s.kz), kw = set1(s.kw);
  const VF ke = set1(s.ke), guidance = set1(s.guidance), top = set1(s.clip), low = set1(-s.clip);
  const auto made = [&](VF state, VF w, VF other, VF* x) {
    VF e = w;
    if constexpr (kGuided) {
      w = fma(guidance, w - other, other);
      e = s.plus_plus ? other : w;
    }
    *x = fma(minus_s, w, a * state);
    if (kGeneral && s.clips) *x = vmin(top, vmax(low, *x));
    const VF next = fma(kw, e, kz * state);
    return kGeneral ? fma(kx, *x, next) : next;
  };
  int64_t i = 0;
  for (; i + kTwo <= s.n; i += kTwo) {
    VF state[2], w[2], other[2] = {}, e[2], x[2];
    get_next_two<true>(z + i, state);
    get_next_two<true>(v + i, w);
    if constexpr (kGuided) get_next_two<true>(free + i, other);
    for (int k = 0; k < 2; ++k) state[k] = made(state[k], w[k], other[k], &x[k]);
    if (noise != nullptr) {
      get_next_two<true>(noise + i, e);
      for (int k = 0; k < 2; ++k) state[k] = fma(ke, e[k], state[k]);
    }
    put_two<true>(z_next + i, state, z_past);
    if (x0 != nullptr) put_two<true>(x0 + i, x, x_past);
  }
  for (; i < s.n; i += kWidth) {
    const int n = static_cast<int>(s.n - i < kWidth ? s.n - i : kWidth);
    VF x, other = set1(0.0f);
    if constexpr (kGuided) other = load_n(free + i, n);
    VF next = made(load_n(z + i, n), load_n(v + i, n), other, &x);
    if (noise != nullptr) next = fma(ke, load_n(noise + i, n), next);
    store_n(z_next + i, next, n);
    if (x0 != nullptr) store_n(x0 + i, x, n);
  }
  if (z_past || x_past) stream_fence();
}

// f(type of the signal, type of the velocity)
template <class F>
inline auto with_kinds(Dtype dtype, Dtype v_dtype, const F& f) {
  if (dtype == Dtype::bf16) return f.template operator()<bf16_t, bf16_t>();
  if (dtype == Dtype::f16) return f.template operator()<fp16_t, fp16_t>();
  if (v_dtype == Dtype::bf16) return f.template operator()<float, bf16_t>();
  if (v_dtype == Dtype::f16) return f.template operator()<float, fp16_t>();
  return f.template operator()<float, float>();
}

}  // namespace

void vdiff_noise(const NoiseSpan& s) {
  with_kinds(s.dtype, s.dtype,
             [&]<class T, class V>() { s.noise == nullptr ? drawn<T>(s) : given<T>(s); });
}

double vdiff_loss(const LossSpan& s) {
  return with_kinds(s.dtype, s.v_dtype, [&]<class T, class V>() {
    return s.grad == nullptr ? loss<T, V, false>(s) : loss<T, V, true>(s);
  });
}

void vdiff_step(const StepSpan& s) {
  with_kinds(s.dtype, s.v_dtype, [&]<class T, class V>() {
    if (s.v_uncond == nullptr)
      return s.general ? step<T, V, false, true>(s) : step<T, V, false, false>(s);
    s.general ? step<T, V, true, true>(s) : step<T, V, true, false>(s);
  });
}

TENFOLD_ISA_END
