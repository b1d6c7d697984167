// SPDX-License-Identifier: Apache-2.0
// See expert_rows.h.
#include "core/cpu/panels.h"
#include "moe/cpu/expert_rows.h"

TENFOLD_ISA_BEGIN
namespace {

template <class F>
inline void with_storage(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f.template operator()<float>();
  if (dtype == Dtype::bf16) return f.template operator()<bf16_t>();
  f.template operator()<fp16_t>();
}

// f(column, how many of a vector's lanes are columns)
template <class F>
inline void for_columns(int64_t cols, const F& f) {
  int64_t c = 0;
  for (; c + kWidth <= cols; c += kWidth) f(c, kWidth);
  if (c < cols) f(c, static_cast<int>(cols - c));
}

template <class T>
inline VF get(const T* from, int n) {
  return n == kWidth ? load(from) : load_n(from, n);
}
template <class T>
inline void put(T* to, VF x, int n) {
  if (n == kWidth) {
    store_quick(to, x);
  } else {
    store_n(to, x, n);
  }
}
template <class T>
inline T* row_of(void* rows, int64_t i, int64_t stride) {
  return static_cast<T*>(rows) + i * stride;
}
template <class T>
inline const T* row_of(const void* rows, int64_t i, int64_t stride) {
  return static_cast<const T*>(rows) + i * stride;
}

inline VF with_base(const float* sums, const float* base, int64_t c, int n) {
  const VF x = load(sums + c);
  return base != nullptr ? x + get(base + c, n) : x;
}

inline const float* base_row(const MoeBase& base, int64_t i) {
  return base.data != nullptr ? base.row(i) : nullptr;
}

template <class T>
void store_rows(const MoeTileRows& t, const MoeStore& s) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* const sums = s.sums + i * kMoePitch;
    const VF by = set1(s.scale * (s.factor != nullptr ? s.factor[t.first + i] : 1.0f));
    T* const out = row_of<T>(s.out, t.first + i, s.stride);
    for_columns(t.cols, [&](int64_t c, int n) { put(out + c, load(sums + c) * by, n); });
  }
}

template <class T>
void swiglu_rows(const MoeTileRows& t, const MoeSwiglu& s) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.first + i;
    const float *const gate = s.gate + i * kMoePitch, *const up = s.up + i * kMoePitch;
    const float *const base_g = base_row(s.base_gate, row), *const base_u =
                                                                base_row(s.base_up, row);
    const VF by = set1(s.factor != nullptr ? s.factor[row] : 1.0f);
    T* const a = row_of<T>(s.a, row, s.a_stride);
    T* const g_out = s.g != nullptr ? row_of<T>(s.g, row, s.g_stride) : nullptr;
    T* const u_out = s.g != nullptr ? row_of<T>(s.u, row, s.g_stride) : nullptr;
    for_columns(t.cols, [&](int64_t c, int n) {
      const VF g = with_base(gate, base_g, c, n), u = with_base(up, base_u, c, n);
      put(a + c, g * sigmoid(g) * u * by, n);
      if (g_out == nullptr) return;
      put(g_out + c, g, n);
      put(u_out + c, u, n);
    });
  }
}

template <class T>
void swiglu_backward_rows(const MoeTileRows& t, const MoeSwigluBackward& s) {
  const VF one = set1(1.0f), zero = set1(0.0f);
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.first + i;
    const float* const sums = s.sums + i * kMoePitch;
    const float* const base = base_row(s.base, row);
    const T *const g_in = row_of<T>(s.g, row, s.g_stride), *u_in = row_of<T>(s.u, row, s.g_stride);
    T *const dg = row_of<T>(s.dg, row, s.g_stride), *const du = row_of<T>(s.du, row, s.g_stride);
    T* const wa = row_of<T>(s.wa, row, s.wa_stride);
    const VF w = set1(s.factor[row]);
    VF dot = zero;
    for_columns(t.cols, [&](int64_t c, int n) {
      VF y = with_base(sums, base, c, n);
      const VF g = get(g_in + c, n), u = get(u_in + c, n), p = sigmoid(g), silu = g * p;
      const VF a = silu * u, all = y * a;
      dot = dot + (n == kWidth ? all : select(lanes_of((1u << n) - 1u), all, zero));
      y = y * w;
      put(dg + c, y * u * (p * fma(g, one - p, one)), n);
      put(du + c, y * silu, n);
      put(wa + c, a * w, n);
    });
    s.dot[row] = hsum(dot);
  }
}

template <class From, class T>
void combine_rows(const MoeTileRows& t, const MoeCombine& m) {
  for (int64_t i = t.first; i < t.first + t.rows; ++i) {
    const float* const base = base_row(m.base, i);
    T* const out = row_of<T>(m.out, i, m.out_stride);
    const int32_t* const at = m.at + i * m.k;
    for_columns(t.cols, [&](int64_t c, int n) {
      VF sum = base != nullptr ? get(base + c, n) : set1(0.0f);
      for (int64_t j = 0; j < m.k; ++j)
        if (at[j] < m.routed) sum = sum + get(row_of<From>(m.in, at[j], m.in_stride) + c, n);
      put(out + c, sum, n);
    });
  }
}

}  // namespace

void moe_store(const MoeTileRows& t, const MoeStore& s) {
  with_storage(s.dtype, [&]<class T>() { store_rows<T>(t, s); });
}

void moe_swiglu(const MoeTileRows& t, const MoeSwiglu& s) {
  with_storage(s.dtype, [&]<class T>() { swiglu_rows<T>(t, s); });
}

void moe_swiglu_backward(const MoeTileRows& t, const MoeSwigluBackward& s) {
  with_storage(s.dtype, [&]<class T>() { swiglu_backward_rows<T>(t, s); });
}

void moe_combine(const MoeTileRows& t, const MoeCombine& c) {
  with_storage(c.dtype, [&]<class T>() {
    if (c.from == Dtype::f32) return combine_rows<float, T>(t, c);
    combine_rows<T, T>(t, c);
  });
}

TENFOLD_ISA_END
