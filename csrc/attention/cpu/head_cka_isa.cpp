// SPDX-License-Identifier: Apache-2.0
// Blocks of the Gram matrix of head_cka. A step multiplies kGramDepth columns: block b is packed
// with its rows as lanes, block a only copied (its values are broadcast), and the products
// accumulate in a float32 block each. bf16 without centring is multiplied in pairs where there are
// bf16 dot products; everything else as float32.
#include "attention/head_cka.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

// kTileRows * kVecs accumulators, kVecs rows of the panel and a broadcast fit the register file.
constexpr int kVecs = 2, kLanes = kVecs * kWidth;
#if defined(TENFOLD_ISA_AVX512)
constexpr int kTileRows = 12;
#elif defined(TENFOLD_ISA_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int64_t kRows = kGramRows + kGramPadding;

inline int lanes(int64_t left) {
  return static_cast<int>(left < kWidth ? left : kWidth);
}

// How values are multiplied: floats, or pairs of bf16 in the bits of a float.
enum class Product { fma, dot };

template <Product P>
inline VF multiply(VF a, VF b, VF sum) {
#if defined(TENFOLD_ISA_BF16)
  if constexpr (P == Product::dot) return dot_bf16(sum, bits(a), bits(b));
#endif
  return fma(a, b, sum);
}

// c[R][kLanes] += a[R] (broadcast) * panel, over `depth` values.
template <Product P, int R>
void gram_tile(const float* a, const float* panel, int64_t depth, float* c) {
  VF sum[R][kVecs];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load(c + r * kRows + v * kWidth);
  for (int64_t k = 0; k < depth; ++k, panel += kLanes) {
    VF right[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) right[v] = load(panel + v * kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const VF left = set1(a[r * kGramPitch + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[r][v] = multiply<P>(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) store(c + r * kRows + v * kWidth, sum[r][v]);
}

// c += strip a * panels of b.
template <Product P>
void multiply_blocks(const float* a, int64_t rows, const float* panels, int64_t columns,
                     int64_t depth, float* c) {
  for (int64_t col = 0; col < columns; col += kLanes, panels += kGramDepth * kLanes) {
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows)
      gram_tile<P, kTileRows>(a + row * kGramPitch, panels, depth, c + row * kRows + col);
    for (; row + 4 <= rows; row += 4)
      gram_tile<P, 4>(a + row * kGramPitch, panels, depth, c + row * kRows + col);
    for (; row < rows; row += 2)  // one row more may be padding
      gram_tile<P, 2>(a + row * kGramPitch, panels, depth, c + row * kRows + col);
  }
}

struct Block {
  int64_t head, first, rows;  // rows [first, first + rows) of a head
};

inline Block block_of(const GramProblem& p, int64_t index) {
  return {index / p.blocks, index % p.blocks * kGramRows, rows_of(p, index)};
}

// Columns [x, x + n) of a block into a strip, as float32 less the mean, or as they are (pairs);
// padding up to a whole pair is zero.
template <class T, Product P>
void fill_strip(const GramProblem& p, const Block& block, int64_t x, int64_t n, float* strip) {
  for (int64_t r = 0; r < block.rows; ++r, strip += kGramPitch) {
    const T* from = static_cast<const T*>(p.w) + block.head * p.head_stride +
                    (block.first + r) * p.row_stride + x;
    if constexpr (P == Product::dot) {
      T* to = reinterpret_cast<T*>(strip);
      int64_t c = 0;
      for (; c + kWidth <= n; c += kWidth) store(to + c, load(from + c));
      if (c < n) store_n(to + c, load_n(from + c, lanes(n - c)), lanes(n - c));
      if (n % 2 != 0) to[n] = T{};
    } else {
      const VF mean = set1(p.mean ? p.mean[block.head * p.dims + block.first + r] : 0.0f);
      for (int64_t c = 0; c < n; c += kWidth)  // what is behind n is not multiplied
        store(strip + c, load_n(from + c, lanes(n - c)) - mean);
    }
  }
}

// panel[k][lane] = strip[lane][k].
inline void pack_panels(const float* strip, int64_t rows, int64_t depth, float* panels) {
  uint32_t offsets[kWidth];
  for (int i = 0; i < kWidth; ++i) offsets[i] = static_cast<uint32_t>(i * kGramPitch);
  const VI at = load(offsets);
  for (int64_t row = 0; row < rows; row += kLanes, panels += kGramDepth * kLanes)
    for (int v = 0; v < kVecs; ++v)
      for (int64_t k = 0; k < depth; ++k)
        store(panels + k * kLanes + v * kWidth,
              gather(strip + (row + v * kWidth) * kGramPitch + k, at));
}

inline void clear(float* at, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) store(at + i, set1(0.0f));
}

// In double, row by row: rows are short enough for float32 sums.
inline double square_sum(const float* c, int64_t rows, int64_t columns) {
  double total = 0.0;
  for (int64_t r = 0; r < rows; ++r, c += kRows) {
    VF sum = set1(0.0f);
    for (int64_t x = 0; x < columns; x += kWidth) {
      const VF value = load_n(c + x, lanes(columns - x));
      sum = fma(value, value, sum);
    }
    total += hsum(sum);
  }
  return total;
}

template <class T, Product P>
void run_blocks(const GramProblem& p, const GramRun& run) {
  float *left = run.scratch, *right = left + kRows * kGramPitch;
  float *panels = right + kRows * kGramPitch, *sums = panels + kRows * kGramDepth;
  constexpr int64_t kStep = P == Product::dot ? 2 * kGramDepth : kGramDepth;
  const Block b = block_of(p, run.b);
  clear(sums, run.num_a * kRows * kRows);
  clear(left, 2 * kRows * kGramPitch);
  for (int64_t x = 0; x < p.length; x += kStep) {
    const int64_t n = p.length - x < kStep ? p.length - x : kStep;
    const int64_t depth = P == Product::dot ? (n + 1) / 2 : n;
    fill_strip<T, P>(p, b, x, n, right);
    pack_panels(right, b.rows, depth, panels);
    for (int64_t i = 0; i < run.num_a; ++i) {
      const Block a = block_of(p, run.a + i);
      fill_strip<T, P>(p, a, x, n, left);
      multiply_blocks<P>(left, a.rows, panels, b.rows, depth, sums + i * kRows * kRows);
    }
  }
  for (int64_t i = 0; i < run.num_a; ++i)
    run.squares[i] = square_sum(sums + i * kRows * kRows, rows_of(p, run.a + i), b.rows);
}

template <class T>
float mean(const T* row, int64_t length) {
  VF sum = set1(0.0f);
  for (int64_t x = 0; x < length; x += kWidth) sum = sum + load_n(row + x, lanes(length - x));
  return hsum(sum) / static_cast<float>(length);
}

}  // namespace

void gram_run(const GramProblem& p, const GramRun& run) {
  if (p.dtype == Dtype::f32) return run_blocks<float, Product::fma>(p, run);
  if (p.dtype == Dtype::f16) return run_blocks<fp16_t, Product::fma>(p, run);
#if defined(TENFOLD_ISA_BF16)
  if (p.mean == nullptr) return run_blocks<bf16_t, Product::dot>(p, run);
#endif
  run_blocks<bf16_t, Product::fma>(p, run);
}

float row_mean(const void* row, Dtype dtype, int64_t length) {
  if (dtype == Dtype::f32) return mean(static_cast<const float*>(row), length);
  if (dtype == Dtype::bf16) return mean(static_cast<const bf16_t*>(row), length);
  return mean(static_cast<const fp16_t*>(row), length);
}

TENFOLD_ISA_END
