// Tiles of linear_wgrad_rows. Panels: rows [depth][kTileRows], columns [depth][kLanes]; the product
// of one of each is a block of kTileRows x kVecs vectors of sums that stays in registers for a
// strip of tokens.
#include "core/cpu/vec.h"
#include "optim/linear_wgrad_rows.h"

TENFOLD_ISA_BEGIN
namespace {

// kTileRows * kVecs sums, kVecs vectors of columns and a broadcast fit the register file.
#if defined(TENFOLD_ISA_AVX512)
constexpr int kVecs = 3, kTileRows = 8;
#elif defined(TENFOLD_ISA_AVX2)
constexpr int kVecs = 2, kTileRows = 6;
#else
constexpr int kVecs = 2, kTileRows = 4;
#endif
constexpr int kLanes = kVecs * kWidth;
static_assert(kWgradRows % kTileRows == 0 && kWgradCols % kLanes == 0);

// How words are multiplied: floats, or pairs of bf16.
enum class Product { fma, dot };

template <Product P>
inline VF multiply(VF a, VF b, VF sum) {
#if defined(TENFOLD_ISA_BF16)
  if constexpr (P == Product::dot) return dot_bf16(sum, bits(a), bits(b));
#endif
  return fma(a, b, sum);
}

// sums[R][kLanes] (rows `pitch` apart) += panel of rows * panel of columns.
template <Product P>
void multiply_panels(const float* rows, const float* cols, int64_t depth, float* sums,
                     int64_t pitch) {
  VF sum[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load(sums + r * pitch + v * kWidth);
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; ++d, rows += kTileRows, cols += kLanes) {
    VF right[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) right[v] = load(cols + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const VF left = set1(rows[r]);
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) sum[r][v] = multiply<P>(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) store(sums + r * pitch + v * kWidth, sum[r][v]);
}

inline float as_float(const float* p) {
  return *p;
}
template <class T>
inline float as_float(const T* p) {
  float x;
  store_n(&x, load_n(p, 1), 1);
  return x;
}
inline float as_float(const bf16_t* p) {
  const uint32_t word = static_cast<uint32_t>(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &word, 4);
  return x;
}

inline float pair_word(bf16_t low, bf16_t high) {
  const uint32_t word = low.bits | static_cast<uint32_t>(high.bits) << 16;
  float x;
  __builtin_memcpy(&x, &word, 4);
  return x;
}

// Chosen columns of grad_out at tokens [t, t + n), panel by panel.
template <class T, Product P>
void pack_rows(const WgradProblem& p, const WgradTile& tile, int64_t t, int64_t n, float* panels) {
  constexpr int kTokens = P == Product::dot ? 2 : 1;  // in a word
  const int64_t depth = (n + kTokens - 1) / kTokens;
  for (int64_t r = 0; r < tile.rows; r += kTileRows, panels += kWgradDepth * kTileRows) {
    int64_t at[kTileRows];
    for (int i = 0; i < kTileRows; ++i)  // rows past the end: the last one again
      at[i] = p.rows[tile.row + (r + i < tile.rows ? r + i : tile.rows - 1)];
    const T* from = static_cast<const T*>(p.grad_out) + t * p.grad_stride;
    float* to = panels;
    for (int64_t d = 0; d < depth; ++d, from += kTokens * p.grad_stride, to += kTileRows) {
      if constexpr (P == Product::dot) {
        const bool both = 2 * d + 1 < n;
        const T* next = both ? from + p.grad_stride : from;
        for (int i = 0; i < kTileRows; ++i)
          to[i] = pair_word(from[at[i]], both ? next[at[i]] : bf16_t{0});
      } else {
        for (int i = 0; i < kTileRows; ++i) to[i] = as_float(from + at[i]);
      }
    }
  }
}

template <class T>
inline VF load_some(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load_n(p, static_cast<int>(n)) : set1(0.0f);
}

// Two tokens' bf16 of the same columns in the halves of a word.
#if defined(TENFOLD_ISA_BF16)
inline VF pair_up(VF low, VF high) {  // bf16 as float32: bits in the upper half
  return from_bits(shr<16>(bits(low)) | bits(high));
}
#endif

// Columns of input at tokens [t, t + n).
template <class T, Product P>
void pack_cols(const WgradProblem& p, const WgradTile& tile, int64_t t, int64_t n, float* panels) {
  constexpr int kTokens = P == Product::dot ? 2 : 1;
  const int64_t depth = (n + kTokens - 1) / kTokens;
  const T* from = static_cast<const T*>(p.input) + t * p.input_stride + tile.col;
  for (int64_t d = 0; d < depth; ++d, from += kTokens * p.input_stride) {
    float* to = panels + d * kLanes;
    for (int64_t c = 0; c < tile.cols; c += kLanes, to += kWgradDepth * kLanes)
      for (int v = 0; v < kVecs; ++v) {
        const int64_t x = c + v * kWidth;
        VF words = load_some(from + x, tile.cols - x);
#if defined(TENFOLD_ISA_BF16)
        if constexpr (P == Product::dot)
          words = pair_up(words, 2 * d + 1 < n ? load_some(from + p.input_stride + x, tile.cols - x)
                                               : set1(0.0f));
#endif
        store(to + v * kWidth, words);
      }
  }
}

template <class T>
void store_tile(const WgradProblem& p, const WgradTile& tile, const float* sums, int64_t pitch) {
  for (int64_t r = 0; r < tile.rows; ++r, sums += pitch) {
    T* to = static_cast<T*>(p.out) + (tile.row + r) * p.num_cols + tile.col;
    int64_t c = 0;
    for (; c + kWidth <= tile.cols; c += kWidth) store(to + c, load(sums + c));
    if (c < tile.cols) store_n(to + c, load(sums + c), static_cast<int>(tile.cols - c));
  }
}

inline int64_t whole(int64_t n, int64_t of) {
  return (n + of - 1) / of * of;
}

template <class T, Product P>
void run_tile(const WgradProblem& p, const WgradTile& tile) {
  const int64_t rows = whole(tile.rows, kTileRows), pitch = whole(tile.cols, kLanes);
  float* const row_panels = tile.scratch;
  float* const col_panels = row_panels + (kWgradRows + kWgradRowPad) * kWgradDepth;
  float* const sums = col_panels + (kWgradCols + kWgradColPad) * kWgradDepth;
  for (int64_t i = 0; i < rows * pitch; i += kWidth) store(sums + i, set1(0.0f));
  constexpr int64_t kStrip = P == Product::dot ? 2 * kWgradDepth : kWgradDepth;
  for (int64_t t = 0; t < p.tokens; t += kStrip) {
    const int64_t n = p.tokens - t < kStrip ? p.tokens - t : kStrip;
    const int64_t depth = P == Product::dot ? (n + 1) / 2 : n;
    pack_rows<T, P>(p, tile, t, n, row_panels);
    pack_cols<T, P>(p, tile, t, n, col_panels);
    for (int64_t c = 0; c < pitch; c += kLanes)
      for (int64_t r = 0; r < rows; r += kTileRows)
        multiply_panels<P>(row_panels + r * kWgradDepth, col_panels + c * kWgradDepth, depth,
                           sums + r * pitch + c, pitch);
  }
  store_tile<T>(p, tile, sums, pitch);
}

}  // namespace

void wgrad_tile(const WgradProblem& p, const WgradTile& tile) {
  if (p.dtype == Dtype::f32) return run_tile<float, Product::fma>(p, tile);
  if (p.dtype == Dtype::f16) return run_tile<fp16_t, Product::fma>(p, tile);
#if defined(TENFOLD_ISA_BF16)
  run_tile<bf16_t, Product::dot>(p, tile);
#else
  run_tile<bf16_t, Product::fma>(p, tile);
#endif
}

TENFOLD_ISA_END
