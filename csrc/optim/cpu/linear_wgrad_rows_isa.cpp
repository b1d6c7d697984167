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
static_assert(kWgradRowStep % kTileRows == 0 && kWgradColStep % kLanes == 0);
constexpr int64_t kRowPanel = kWgradDepth * kTileRows + kWgradPanelPad;
constexpr int64_t kColPanel = kWgradDepth * kLanes + kWgradPanelPad;

// How words are multiplied: floats, or pairs of bf16.
enum class Product { fma, dot };

template <Product P>
constexpr int64_t kStripTokens = P == Product::dot ? 2 * kWgradDepth : kWgradDepth;

template <Product P>
inline VF multiply(VF a, VF b, VF sum) {
#if defined(TENFOLD_ISA_BF16)
  if constexpr (P == Product::dot) return dot_bf16(sum, bits(a), bits(b));
#endif
  return fma(a, b, sum);
}

// Products that are added one after another before they join the sums; without fused multiply-adds
// each costs two roundings.
#if defined(TENFOLD_ISA_AVX512) || defined(TENFOLD_ISA_AVX2)
constexpr int64_t kChain = kWgradDepth;
#else
constexpr int64_t kChain = 16;
#endif

// sums[kTileRows][kLanes] (rows `pitch` apart) += panel of rows * panel of columns, depth <=
// kChain.
template <Product P>
void multiply_chain(const float* rows, const float* cols, int64_t depth, float* sums,
                    int64_t pitch) {
  VF sum[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) sum[r][v] = set1(0.0f);
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
    for (int v = 0; v < kVecs; ++v) {
      float* const to = sums + r * pitch + v * kWidth;
      store(to, load(to) + sum[r][v]);
    }
}

template <Product P>
inline void multiply_panels(const float* rows, const float* cols, int64_t depth, float* sums,
                            int64_t pitch) {
  for (int64_t d = 0; d < depth; d += kChain)
    multiply_chain<P>(rows + d * kTileRows, cols + d * kLanes,
                      depth - d < kChain ? depth - d : kChain, sums, pitch);
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

// Chosen columns of grad_out at tokens [t, t + n). Token by token: tokens lie a multiple of many
// powers of two apart, and a column's neighbours are in the line that its token has just brought.
// Rows of the last panel that do not exist repeat the last one.
template <class T, Product P>
void pack_rows(const WgradProblem& p, int64_t row, int64_t rows, int64_t t, int64_t n,
               float* panels) {
  constexpr int kTokens = P == Product::dot ? 2 : 1;  // in a word
  const T* from = static_cast<const T*>(p.grad_out) + t * p.grad_stride;
  int64_t at[kWgradRows];
  const int64_t padded = wgrad_whole(rows, kTileRows);
  for (int64_t r = 0; r < padded; ++r) at[r] = p.rows[row + (r < rows ? r : rows - 1)];
  for (int64_t d = 0; kTokens * d < n; ++d, from += kTokens * p.grad_stride) {
    float* to = panels + d * kTileRows;
    const T* next = kTokens * d + 1 < n ? from + p.grad_stride : nullptr;
    for (int64_t r = 0; r < padded; r += kTileRows, to += kRowPanel)
      for (int i = 0; i < kTileRows; ++i) {
        if constexpr (P == Product::dot) {
          to[i] = pair_word(from[at[r + i]], next != nullptr ? next[at[r + i]] : bf16_t{0});
        } else {
          to[i] = as_float(from + at[r + i]);
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
void pack_cols(const WgradProblem& p, int64_t col, int64_t cols, int64_t t, int64_t n,
               float* panels) {
  constexpr int kTokens = P == Product::dot ? 2 : 1;
  const int64_t depth = (n + kTokens - 1) / kTokens;
  const T* from = static_cast<const T*>(p.input) + t * p.input_stride + col;
  for (int64_t d = 0; d < depth; ++d, from += kTokens * p.input_stride) {
    float* to = panels + d * kLanes;
    for (int64_t c = 0; c < cols; c += kLanes, to += kColPanel)
      for (int v = 0; v < kVecs; ++v) {
        const int64_t x = c + v * kWidth;
        VF words = load_some(from + x, cols - x);
#if defined(TENFOLD_ISA_BF16)
        if constexpr (P == Product::dot)
          words = pair_up(
              words, 2 * d + 1 < n ? load_some(from + p.input_stride + x, cols - x) : set1(0.0f));
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

template <class T, Product P>
void run_tile(const WgradProblem& p, const WgradTile& tile) {
  const int64_t rows = wgrad_whole(tile.rows, kTileRows), pitch = wgrad_whole(tile.cols, kLanes);
  for (int64_t i = 0; i < rows * pitch; i += kWidth) store(tile.sums + i, set1(0.0f));
  const float *row_panels = tile.row_panels, *col_panels = tile.col_panels;
  constexpr int64_t kStrip = kStripTokens<P>;
  for (int64_t t = 0; t < p.tokens; t += kStrip) {
    const int64_t n = p.tokens - t < kStrip ? p.tokens - t : kStrip;
    const int64_t depth = P == Product::dot ? (n + 1) / 2 : n;
    for (int64_t c = 0; c < pitch; c += kLanes)
      for (int64_t r = 0; r < rows; r += kTileRows)
        multiply_panels<P>(row_panels + r / kTileRows * kRowPanel,
                           col_panels + c / kLanes * kColPanel, depth, tile.sums + r * pitch + c,
                           pitch);
    row_panels += tile.row_strip, col_panels += tile.col_strip;
  }
  store_tile<T>(p, tile, tile.sums, pitch);
}

// f<element, product>(), as this ISA computes the dtype.
template <class F>
inline auto with_product(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f.template operator()<float, Product::fma>();
  if (dtype == Dtype::f16) return f.template operator()<fp16_t, Product::fma>();
#if defined(TENFOLD_ISA_BF16)
  return f.template operator()<bf16_t, Product::dot>();
#else
  return f.template operator()<bf16_t, Product::fma>();
#endif
}

}  // namespace

int64_t wgrad_strip_tokens(Dtype dtype) {
  return with_product(dtype, []<class T, Product P>() { return kStripTokens<P>; });
}

void wgrad_pack_rows(const WgradProblem& p, int64_t row, int64_t rows, int64_t strip,
                     float* panels) {
  with_product(p.dtype, [&]<class T, Product P>() {
    const int64_t t = strip * kStripTokens<P>, left = p.tokens - t;
    pack_rows<T, P>(p, row, rows, t, left < kStripTokens<P> ? left : kStripTokens<P>, panels);
  });
}

void wgrad_pack_cols(const WgradProblem& p, int64_t col, int64_t cols, int64_t strip,
                     float* panels) {
  with_product(p.dtype, [&]<class T, Product P>() {
    const int64_t t = strip * kStripTokens<P>, left = p.tokens - t;
    pack_cols<T, P>(p, col, cols, t, left < kStripTokens<P> ? left : kStripTokens<P>, panels);
  });
}

void wgrad_tile(const WgradProblem& p, const WgradTile& tile) {
  with_product(p.dtype, [&]<class T, Product P>() { run_tile<T, P>(p, tile); });
}

TENFOLD_ISA_END
