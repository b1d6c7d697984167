// SPDX-License-Identifier: Apache-2.0
// See diffusion/resample.h. Strips of a row: results as floats in the first cache, then out. Near
// the ends of a row the definition itself; elsewhere `down` and the gradient of `up` are a sum of
// eight from even and odd samples, `up` and the gradient of `down` two sums of four.
#include <cstring>

#include "core/cpu/pairs.h"
#include "diffusion/resample.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kStrip = 512;  // outputs
constexpr int64_t kRoom = kStrip + 64;
constexpr int64_t kEnds = 8;  // outputs that reflections can reach, and more

// n floats, n whole vectors of memory, as even and odd ones. (Left to the compiler, which knows the
// shuffles of every instruction set.)
inline void part(const float* from, int64_t n, float* even, float* odd) {
  for (int64_t i = 0; i < n; ++i) {
    even[i] = from[2 * i];
    odd[i] = from[2 * i + 1];
  }
}

inline void weave(const float* even, const float* odd, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[2 * i] = even[i];
    to[2 * i + 1] = odd[i];
  }
}

// Pairs of neighbours from x on, n of each.
template <class T>
inline void read_parted(const T* x, int64_t n, float* even, float* odd) {
  if constexpr (sizeof(T) == 4) {
    part(x, n, even, odd);
  } else {
    alignas(64) float wide[2 * kRoom];
    int64_t i = 0;
    for (; i + kWidth <= 2 * n; i += kWidth) store(wide + i, load(x + i));
    if (i < 2 * n) {
      const int some = static_cast<int>(2 * n - i);
      store_n(wide + i, load_n(x + i, some), some);
    }
    part(wide, n, even, odd);
  }
}

template <class T>
inline void write_out(const float* from, int64_t n, T* to, bool past) {
  int64_t i = 0;
  if (past) {  // up to where vectors are aligned
    while (i < n && !is_aligned(to + i)) {
      store_n(to + i, load_n(from + i, 1), 1);
      ++i;
    }
  }
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const VF two[2] = {load(from + i), load(from + i + kWidth)};
    put_two<true>(to + i, two, past);
  }
  for (; i < n; i += kWidth) {
    const int some = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    store_n(to + i, load_n(from + i, some), some);
  }
}

template <class T>
inline void at_ends(const FirSpan& s, int64_t begin, int64_t end) {
  const T* const x = static_cast<const T*>(s.x);
  const auto get = [&](int64_t j) { return static_cast<double>(hsum(load_n(x + j, 1))); };
  for (int64_t i = begin; i < end; ++i) {
    const VF made = set1(static_cast<float>(fir_at<double>(s.kind, i, s.length, get)));
    store_n(static_cast<T*>(s.y) + i, made, 1);
  }
}

struct Taps {
  VF t0, t1, t2, t3;
};

// Outputs j .. j + n of eight neighbours from x[2 j - 3] on.
template <class T>
inline void reduce(const T* x, T* y, int64_t j, int64_t n, const Taps& h, bool past) {
  alignas(64) float even[kRoom], odd[kRoom], made[kRoom];
  // even[i] = x[2 (j - 2 + i)], odd[i] = x[2 (j - 2 + i) + 1]
  read_ahead<2 * kStrip>(x + 2 * (j - 2));
  read_parted(x + 2 * (j - 2), n + 5, even, odd);
  for (int64_t i = 0; i < n; i += kWidth) {  // rooms have space for whole vectors
    const VF outer = load(odd + i) + load(even + i + 4);
    VF sum = h.t0 * outer;
    sum = fma(h.t1, load(even + i + 1) + load(odd + i + 3), sum);
    sum = fma(h.t2, load(odd + i + 1) + load(even + i + 3), sum);
    sum = fma(h.t3, load(even + i + 2) + load(odd + i + 2), sum);
    store(made + i, sum);
  }
  write_out(made, n, y + j, past);
}

// Outputs 2 m .. 2 (m + n) of the neighbours x[m - 2] .. x[m + 2].
template <class T>
inline void expand(const T* x, T* y, int64_t m, int64_t n, const Taps& h, bool past) {
  alignas(64) float even[kRoom], odd[kRoom], made[2 * kRoom];
  for (int64_t i = 0; i < n; i += kWidth) {
    VF at[5];
    if (i + kWidth <= n) {
      for (int k = 0; k < 5; ++k) at[k] = load(x + m + i + k - 2);
    } else {
      const int some = static_cast<int>(n - i);
      for (int k = 0; k < 5; ++k) at[k] = load_n(x + m + i + k - 2, some);
    }
    store(even + i, fma(h.t0, at[0], fma(h.t2, at[1], fma(h.t1, at[3], h.t3 * at[2]))));
    store(odd + i, fma(h.t0, at[4], fma(h.t2, at[3], fma(h.t1, at[1], h.t3 * at[2]))));
  }
  weave(even, odd, n, made);
  write_out(made, 2 * n, y + 2 * m, past);
}

template <class T>
void row(const FirSpan& s) {
  const bool halves = s.kind == Fir::down || s.kind == Fir::up_grad;
  const float by = s.kind == Fir::up || s.kind == Fir::up_grad ? 2.0f : 1.0f;
  const Taps h{set1(by * kFir0), set1(by * kFir1), set1(by * kFir2), set1(by * kFir3)};
  // Outputs of the whole row.
  const int64_t all = s.kind == Fir::down ? s.length / 2
                      : s.kind == Fir::up ? 2 * s.length
                                          : s.length;
  // An odd end of `down_grad` belongs to no pair; both kinds of ends are far from reflections.
  const int64_t low = kEnds, high = (all - kEnds) / 2 * 2;
  const T* const x = static_cast<const T*>(s.x);
  T* const y = static_cast<T*>(s.y);
  if (low >= high) return at_ends<T>(s, s.begin, s.end);
  at_ends<T>(s, s.begin, s.end < low ? s.end : low);
  const int64_t begin = s.begin > low ? s.begin : low, end = s.end < high ? s.end : high;
  if (halves) {
    for (int64_t j = begin; j < end; j += kStrip)
      reduce(x, y, j, end - j < kStrip ? end - j : kStrip, h, s.past_caches);
  } else {
    for (int64_t i = begin; i < end; i += kStrip)
      expand(x, y, i / 2, (end - i < kStrip ? end - i : kStrip) / 2, h, s.past_caches);
  }
  at_ends<T>(s, s.begin > high ? s.begin : high, s.end);
  if (s.past_caches) stream_fence();
}

}  // namespace

void fir_row(const FirSpan& s) {
  if (s.dtype == Dtype::f32) return row<float>(s);
  if (s.dtype == Dtype::bf16) return row<bf16_t>(s);
  row<fp16_t>(s);
}

void copy_row(const void* from, void* to, int64_t bytes, bool past_caches) {
  const auto* in = static_cast<const char*>(from);
  auto* out = static_cast<char*>(to);
  constexpr int64_t kVector = kWidth * static_cast<int64_t>(sizeof(float));
  if (past_caches) {
    const int64_t ahead =
        (kVector - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kVector)) % kVector;
    const int64_t first = ahead < bytes ? ahead : bytes;
    memcpy(out, in, static_cast<size_t>(first));
    in += first, out += first, bytes -= first;
    for (; bytes >= kVector; in += kVector, out += kVector, bytes -= kVector)
      stream(reinterpret_cast<float*>(out), load(reinterpret_cast<const float*>(in)));
    stream_fence();
  }
  memcpy(out, in, static_cast<size_t>(bytes));
}

TENFOLD_ISA_END
