// SPDX-License-Identifier: Apache-2.0
// Tiles of linear_wgrad_rows. Panels: rows [depth][kPanel], columns [depth][kTileRows]; the product
// of one of each is a block of sums that stays in registers for a strip of tokens.
#include "core/cpu/panels.h"
#include "optim/linear_wgrad_rows.h"

TENFOLD_ISA_BEGIN
namespace {

static_assert(kWgradRowStep % kPanel == 0 && kWgradColStep % kTileRows == 0);
static_assert(kWgradDepth % kStrip == 0);
constexpr int64_t kRowPanel = kWgradDepth * kPanel + kWgradPanelPad;
constexpr int64_t kColPanel = kWgradDepth * kTileRows + kWgradPanelPad;

template <bool Dot>
constexpr int64_t kStripTokens = Dot ? 2 * kWgradDepth : kWgradDepth;

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
template <class T, bool Dot>
void pack_grad(const WgradProblem& p, int64_t row, int64_t rows, int64_t t, int64_t n,
               float* panels) {
  constexpr int kTokens = Dot ? 2 : 1;  // in a word
  const T* from = static_cast<const T*>(p.grad_out) + t * p.grad_stride;
  int64_t at[kWgradRows];
  const int64_t padded = wgrad_whole(rows, kPanel);
  for (int64_t r = 0; r < padded; ++r) at[r] = p.rows[row + (r < rows ? r : rows - 1)];
  for (int64_t d = 0; kTokens * d < n; ++d, from += kTokens * p.grad_stride) {
    float* to = panels + d * kPanel;
    const T* next = kTokens * d + 1 < n ? from + p.grad_stride : nullptr;
    for (int64_t r = 0; r < padded; r += kPanel, to += kRowPanel)
      for (int i = 0; i < kPanel; ++i) {
        if constexpr (Dot) {
          to[i] = pair_word(from[at[r + i]], next != nullptr ? next[at[r + i]] : bf16_t{0});
        } else {
          to[i] = as_float(from + at[r + i]);
        }
      }
  }
}

// Columns of input at tokens [t, t + n).
template <class T, bool Dot>
void pack_cols(const WgradProblem& p, int64_t col, int64_t cols, int64_t t, int64_t n,
               float* panels) {
  const T* const from = static_cast<const T*>(p.input) + t * p.input_stride + col;
  pack_lanes<T, Dot>([&](int64_t i) { return from + i * p.input_stride; }, n, cols, kColPanel,
                     panels);
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

template <class T, bool Dot>
void run_tile(const WgradProblem& p, const WgradTile& tile) {
  const int64_t rows = wgrad_whole(tile.rows, kPanel), pitch = wgrad_whole(tile.cols, kTileRows);
  for (int64_t i = 0; i < rows * pitch; i += kWidth) store(tile.sums + i, set1(0.0f));
  const float *row_panels = tile.row_panels, *col_panels = tile.col_panels;
  constexpr int64_t kTokens = kStripTokens<Dot>;
  for (int64_t t = 0; t < p.tokens; t += kTokens) {
    const int64_t depth = words<Dot>(p.tokens - t < kTokens ? p.tokens - t : kTokens);
    for (int64_t d = 0; d < depth; d += kStrip)
      for (int64_t c = 0; c < tile.cols; c += kTileRows)
        multiply_panels<Dot>(col_panels + c / kTileRows * kColPanel + d * kTileRows,
                             row_panels + d * kPanel, kRowPanel, rows / kPanel, tile.cols - c,
                             depth - d < kStrip ? depth - d : kStrip, tile.sums + c, pitch, true);
    row_panels += tile.row_strip, col_panels += tile.col_strip;
  }
  store_tile<T>(p, tile, tile.sums, pitch);
}

}  // namespace

int64_t wgrad_strip_tokens(Dtype dtype) {
  return with_dtype(dtype, []<class T, bool Dot>() { return kStripTokens<Dot>; });
}

void wgrad_pack_rows(const WgradProblem& p, int64_t row, int64_t rows, int64_t strip,
                     float* panels) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    const int64_t t = strip * kStripTokens<Dot>, left = p.tokens - t;
    pack_grad<T, Dot>(p, row, rows, t, left < kStripTokens<Dot> ? left : kStripTokens<Dot>, panels);
  });
}

void wgrad_pack_cols(const WgradProblem& p, int64_t col, int64_t cols, int64_t strip,
                     float* panels) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    const int64_t t = strip * kStripTokens<Dot>, left = p.tokens - t;
    pack_cols<T, Dot>(p, col, cols, t, left < kStripTokens<Dot> ? left : kStripTokens<Dot>, panels);
  });
}

void wgrad_tile(const WgradProblem& p, const WgradTile& tile) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() { run_tile<T, Dot>(p, tile); });
}

TENFOLD_ISA_END
