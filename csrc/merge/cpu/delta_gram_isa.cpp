// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/vec.h"
#include "merge/delta_gram.h"

TENFOLD_ISA_BEGIN
namespace {

// A register of doubles. There are kLanes partial sums whatever its size: one result on every ISA.
#if defined(TENFOLD_ISA_AVX512)
constexpr int kPerRegister = 8;
#elif defined(TENFOLD_ISA_AVX2)
constexpr int kPerRegister = 4;
#else
constexpr int kPerRegister = 2;
#endif
typedef double Doubles __attribute__((vector_size(kPerRegister * sizeof(double))));
constexpr int kLanes = 8, kRegisters = kLanes / kPerRegister;

// n elements, and zeros up to a multiple of kLanes.
template <class T>
void to_floats(const T* x, int64_t n, float* out) {
  for (int64_t i = n; i % kLanes != 0; ++i) out[i] = 0.0f;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(x + i));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(out + i, load_n(x + i, left), left);
  }
}

void floats_of(const void* x, Dtype dtype, int64_t begin, int64_t n, float* out) {
  if (dtype == Dtype::f32) return to_floats(static_cast<const float*>(x) + begin, n, out);
  if (dtype == Dtype::bf16) return to_floats(static_cast<const bf16_t*>(x) + begin, n, out);
  to_floats(static_cast<const fp16_t*>(x) + begin, n, out);
}

inline Doubles at(const double* x) {
  Doubles d;
  __builtin_memcpy(&d, x, sizeof(d));
  return d;
}
inline void put(double* x, Doubles d) {
  __builtin_memcpy(x, &d, sizeof(d));
}
#if defined(TENFOLD_ISA_AVX512)
inline Doubles doubles_at(const float* x) {
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(x));
}
inline Doubles doubles_at(const bf16_t* x) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return (Doubles)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
}
#elif defined(TENFOLD_ISA_AVX2)
inline Doubles doubles_at(const float* x) {
  return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(x));
}
inline Doubles doubles_at(const bf16_t* x) {
  const __m128i words = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
  return (Doubles)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(words, 16)));
}
#else
template <class T>
inline Doubles doubles_at(const T* x) {
  float four[kWidth];
  store(four, load_n(x, kPerRegister));
  return Doubles{four[0], four[1]};
}
#endif

// Registers of one element of the matrix.
struct Lanes {
  Doubles sum[kRegisters] = {};
  double total() const {
    double lanes[kLanes], all = 0.0;
    __builtin_memcpy(lanes, sum, sizeof(lanes));
    for (int lane = 0; lane < kLanes; ++lane) all += lanes[lane];
    return all;
  }
};

// gram[j, k] += x_j . y_k for J rows x and K rows y, kGramStrip apart, unless it is below the
// diagonal; n is a multiple of kLanes. Several sums at once: each waits for its last addition.
template <int J, int K>
inline void add_dots(const double* x, const double* y, int64_t n, int ahead, double* gram,
                     int pitch) {
  Lanes sums[J][K];
  for (int64_t i = 0; i < n; i += kLanes)
#pragma GCC unroll 8
    for (int r = 0; r < kRegisters; ++r) {
      Doubles a[J];
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) a[j] = at(x + j * kGramStrip + i + r * kPerRegister);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Doubles b = at(y + k * kGramStrip + i + r * kPerRegister);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) sums[j][k].sum[r] += a[j] * b;
      }
    }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
      if (ahead + k >= j) gram[j * pitch + k] += sums[j][k].total();
}

#if defined(TENFOLD_ISA_AVX512)
constexpr int kRows = 2;
constexpr int kFew = 4;  // experts whose sums and differences fit the registers
#else
constexpr int kRows = 1;
constexpr int kFew = 2;
#endif

// Rows [j, j + J) with rows from k on.
template <int J>
inline void add_some_dots(const double* rows, int64_t n, int j, int k, int m, double* gram) {
  const double *const x = rows + j * kGramStrip, *const y = rows + k * kGramStrip;
  double* const out = gram + j * m + k;
  if (m - k >= 4) return add_dots<J, 4>(x, y, n, k - j, out, m);
  if (m - k == 3) return add_dots<J, 3>(x, y, n, k - j, out, m);
  if (m - k == 2) return add_dots<J, 2>(x, y, n, k - j, out, m);
  add_dots<J, 1>(x, y, n, k - j, out, m);
}

// Elements [begin, begin + n) of any number of experts: differences first, then their products.
void add_strip(const GramInput& in, int64_t begin, int64_t n, double* rows, double* gram) {
  alignas(64) float x[kGramStrip + kWidth];
  alignas(64) double base[kGramStrip] = {};
  const int m = in.experts;
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  if (in.base != nullptr) {
    floats_of(in.base, in.dtype, begin, n, x);
    for (int64_t j = 0; j < padded; j += kPerRegister) put(base + j, doubles_at(x + j));
  }
  for (int e = 0; e < m; ++e) {
    double* const row = rows + e * kGramStrip;
    floats_of(in.expert[e], in.dtype, begin, n, x);
    for (int64_t j = 0; j < padded; j += kPerRegister)
      put(row + j, doubles_at(x + j) - at(base + j));
  }
  for (int j = 0; j < m; j += kRows)
    for (int k = j; k < m; k += 4) {
      if (m - j >= kRows) {
        add_some_dots<kRows>(rows, padded, j, k, m, gram);
      } else {
        add_some_dots<1>(rows, padded, j, k, m, gram);
      }
    }
}

// A whole strip of M experts, in registers.
template <class T, int M, bool kBase>
void add_few(const GramInput& in, int64_t begin, double* gram) {
  Lanes sums[M][M];
  const T* const base = static_cast<const T*>(in.base) + (kBase ? begin : 0);
  for (int64_t i = 0; i < kGramStrip; i += kLanes)
#pragma GCC unroll 8
    for (int r = 0; r < kRegisters; ++r) {
      const int64_t at = i + r * kPerRegister;
      Doubles d[M];
#pragma GCC unroll 8
      for (int e = 0; e < M; ++e) {
        d[e] = doubles_at(static_cast<const T*>(in.expert[e]) + begin + at);
        d[e] -= kBase ? doubles_at(base + at) : Doubles{};
      }
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j)
#pragma GCC unroll 8
        for (int k = j; k < M; ++k) sums[j][k].sum[r] += d[j] * d[k];
    }
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j)
#pragma GCC unroll 8
    for (int k = j; k < M; ++k) gram[j * M + k] += sums[j][k].total();
}

template <class T, int M>
bool try_few(const GramInput& in, int64_t begin, double* gram) {
  if constexpr (M > kFew) {
    return false;
  } else {
    if (in.experts != M) return try_few<T, M + 1>(in, begin, gram);
    if (in.base != nullptr) {
      add_few<T, M, true>(in, begin, gram);
    } else {
      add_few<T, M, false>(in, begin, gram);
    }
    return true;
  }
}

}  // namespace

void gram_part(const GramInput& in, int64_t begin, int64_t end, double* rows, double* gram) {
  for (int64_t i = begin; i < end; i += kGramStrip) {
    const int64_t n = end - i < kGramStrip ? end - i : kGramStrip;
    const bool whole = n == kGramStrip;
    if (whole && in.dtype == Dtype::f32 && try_few<float, 1>(in, i, gram)) continue;
    if (whole && in.dtype == Dtype::bf16 && try_few<bf16_t, 1>(in, i, gram)) continue;
    add_strip(in, i, n, rows, gram);
  }
}

TENFOLD_ISA_END
