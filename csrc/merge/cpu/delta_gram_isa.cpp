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

template <class T>
void to_floats(const T* x, int64_t n, float* out) {
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

// out[k] += x . y_k for N rows y, kGramStrip apart; n is a multiple of kLanes.
template <int N>
inline void add_dots(const double* x, const double* y, int64_t n, double* out) {
  Doubles sum[N][kRegisters] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int r = 0; r < kRegisters; ++r) {
      Doubles a, b;
      __builtin_memcpy(&a, x + i + r * kPerRegister, sizeof(a));
      for (int k = 0; k < N; ++k) {
        __builtin_memcpy(&b, y + k * kGramStrip + i + r * kPerRegister, sizeof(b));
        sum[k][r] += a * b;
      }
    }
  }
  for (int k = 0; k < N; ++k) {
    double total = 0.0;
    for (int lane = 0; lane < kLanes; ++lane)
      total += sum[k][lane / kPerRegister][lane % kPerRegister];
    out[k] += total;
  }
}

}  // namespace

void gram_part(const GramInput& in, int64_t begin, int64_t end, double* rows, double* gram) {
  alignas(64) float base[kGramStrip] = {}, x[kGramStrip];
  const int m = in.experts;
  for (int64_t i = begin; i < end; i += kGramStrip) {
    const int64_t n = end - i < kGramStrip ? end - i : kGramStrip;
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    if (in.base != nullptr) floats_of(in.base, in.dtype, i, n, base);
    for (int e = 0; e < m; ++e) {
      double* const row = rows + e * kGramStrip;
      floats_of(in.expert[e], in.dtype, i, n, x);
      for (int64_t j = 0; j < n; ++j)
        row[j] = static_cast<double>(x[j]) - static_cast<double>(base[j]);
      for (int64_t j = n; j < padded; ++j) row[j] = 0.0;
    }
    for (int j = 0; j < m; ++j) {
      const double* const row = rows + j * kGramStrip;
      for (int k = j; k < m; k += 4) {
        const double* const others = rows + k * kGramStrip;
        double* const out = gram + j * m + k;
        if (m - k >= 4) {
          add_dots<4>(row, others, padded, out);
        } else if (m - k == 3) {
          add_dots<3>(row, others, padded, out);
        } else if (m - k == 2) {
          add_dots<2>(row, others, padded, out);
        } else {
          add_dots<1>(row, others, padded, out);
        }
      }
    }
  }
}

TENFOLD_ISA_END
