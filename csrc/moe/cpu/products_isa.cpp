// SPDX-License-Identifier: Apache-2.0
// See products.h.
#include "core/cpu/packed.h"
#include "core/cpu/pairs.h"
#include "moe/cpu/products.h"

TENFOLD_ISA_BEGIN
namespace {

static_assert(kMoeColUnit % kTileRows == 0 && kMoeCols % kMoeColUnit == 0);
static_assert(kMoeStrip % kStrip == 0 && kMoeRows % kPanel == 0);
constexpr int64_t kLanes = kTileRows * kMoeStrip + kMoePad;  // floats from tile to tile

template <bool Dot>
constexpr int64_t kStripDepth = Dot ? 2 * kMoeStrip : kMoeStrip;
template <bool Dot>
constexpr int64_t kPanels = kPackRows<Dot> * kMoeStrip + kMoePad;  // floats from panel to panel
static_assert(kMoeRows % kPackRows<true> == 0 &&
              kMoeRows / kPackRows<true> * kPanels<true> <= kMoeRows / 8 * kMoePanel);

template <class T>
inline const T* row_at(const MoeRows& rows, int64_t i) {
  const int64_t row = rows.gather != nullptr ? rows.gather[i] : i;
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

// Where a strip's operands are packed.
struct Packed {
  float *panels, *lanes, *staged;
  explicit Packed(float* room)
      : panels(room),
        lanes(panels + kMoeRows / 8 * kMoePanel),
        staged(lanes + kMoeCols / kTileRows * kLanes) {}
};

template <bool Dot>
void multiply_strip(const Packed& m, int64_t rows, int64_t cols, int64_t n, bool add, float* sums) {
  multiply_packed<Dot>(m.panels, kPanels<Dot>, rows, m.lanes, kLanes, cols, packed_words<Dot>(n),
                       sums, kMoePitch, add);
}

inline void clear(float* sums, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += kWidth) store(sums + r * kMoePitch + c, set1(0.0f));
}

template <class T, bool Dot>
void product_packed(const MoeProduct& p) {
  const Packed m(p.room);
  const T* const w = static_cast<const T*>(p.w);
  if (p.depth == 0 && !p.add) clear(p.sums, p.rows, p.cols);
  for (int64_t k = 0; k < p.depth; k += kStripDepth<Dot>) {
    const int64_t n = p.depth - k < kStripDepth<Dot> ? p.depth - k : kStripDepth<Dot>;
    for (int64_t r = 0; r < p.rows; r += kPackRows<Dot>) {
      const T* row[kPackRows<Dot>] = {};
      for (int64_t i = 0; i < kPackRows<Dot> && r + i < p.rows; ++i)
        row[i] = row_at<T>(p.a, p.first + r + i) + k;
      pack_panel<T, Dot>(row, n, m.staged, m.panels + r / kPackRows<Dot> * kPanels<Dot>);
    }
    if (p.by_rows) {
      for (int64_t c = 0; c < p.cols; c += kTileRows) {
        const T* row[kTileRows] = {};
        for (int64_t i = 0; i < kTileRows && c + i < p.cols; ++i)
          row[i] = w + (c + i) * p.w_stride + k;
        const int64_t left = round_up(p.cols - c, kWidth);
        pack_tile<T, Dot>(row, n, m.staged, m.lanes + c / kTileRows * kLanes,
                          left < kTileRows ? left : kTileRows);
      }
    } else {
      pack_tiles_along<T, Dot>([&](int64_t i) { return w + (k + i) * p.w_stride; }, n, p.cols,
                               kLanes, m.lanes);
    }
    multiply_strip<Dot>(m, p.rows, p.cols, n, p.add || k > 0, p.sums);
  }
}

#if defined(TENFOLD_ISA_AMX)
// Rows of w are left tiles as they lie; only those of a are packed, as lanes. The sums are
// transposed, and turned block by block where the depth is one strip.
class Turned {
 public:
  explicit Turned(const MoeProduct& p)
      : p_(p),
        words_(moe_turned_words(p.depth)),
        tile_(kTileRows * words_ + kMoePad),
        lanes_(p.room),
        sums_(lanes_ + (kMoeRows + kTileRows - 1) / kTileRows * tile_),
        spare_(sums_ + kMoeCols * kPitch) {}

  void run() const {
    const int64_t depth = 2 * words_;
    const bool whole = p_.depth <= depth;
    const AmxTiles registers;
    for (int64_t k = 0; k < p_.depth; k += depth) {
      const int64_t n = p_.depth - k < depth ? p_.depth - k : depth;
      if (!p_.again || !whole) pack(k, n);
      const auto* const w = static_cast<const bf16_t*>(p_.w) + k;
      const bool last = k + n == p_.depth;
      multiply_rows({w, p_.w_stride, p_.cols}, n, kBlock, words_, spare_, lanes_, tile_, p_.rows,
                    sums_, kPitch, k > 0, [&](int64_t c, int64_t rows, float* sums) {
                      if (last) turn(sums, c, rows);
                      return whole ? sums : sums + rows * kPitch;
                    });
    }
  }

 private:
  static constexpr int64_t kBlock = 32, kPitch = kMoeRows + kMoePad;

  // Elements [k, k + n) of the rows of a.
  void pack(int64_t k, int64_t n) const {
    for (int64_t r = 0; r < p_.rows; r += kTileRows) {
      const bf16_t* row[kTileRows] = {};
      for (int64_t i = 0; i < kTileRows && r + i < p_.rows; ++i)
        row[i] = row_at<bf16_t>(p_.a, p_.first + r + i) + k;
      const int64_t left = round_up(p_.rows - r, kWidth);
      pack_tile<bf16_t, true>(row, n, nullptr, lanes_ + r / kTileRows * tile_,
                              left < kTileRows ? left : kTileRows);
    }
  }
  void turn(const float* sums, int64_t c, int64_t cols) const {
    for (int64_t j = 0; j < cols; j += 16)
      for (int64_t r = 0; r < p_.rows; r += 16)
        transpose16([&](int i) { return sums + (j + i) * kPitch + r; },
                    p_.sums + r * kMoePitch + c + j, kMoePitch);
  }

  const MoeProduct& p_;
  int64_t words_, tile_;
  float *lanes_, *sums_, *spare_;
};
#endif

// Dot products: kDotCols rows of w times Rows rows of a, whose sums fill the registers.
constexpr int kDotCols = 4;
#if defined(TENFOLD_ISA_AVX512)
constexpr int kDotRows = 6;  // 24 sums, 4 vectors of w, one of a
#else
constexpr int kDotRows = 2;
#endif

// A vector of words from n elements of a row of w.
template <class T, bool Dot>
inline VF row_words(const T* from, int64_t n) {
#if defined(TENFOLD_ISA_BF16)
  if constexpr (Dot) return bf16_words(from, n);
#endif
  return load_some(from, n);
}

template <bool Dot>
inline VF add_words(VF sum, VF a, VF b) {
#if defined(TENFOLD_ISA_BF16)
  if constexpr (Dot) return dot_bf16(sum, bits(a), bits(b));
#endif
  return fma(a, b, sum);
}

// sums[Rows][Cols] from `from` on; a: words, `pitch` apart, zero-padded to whole vectors.
// `ahead`: the next rows of w are on their way from memory while these are multiplied.
template <class T, bool Dot, int Cols, int Rows>
void dot_block(const T* w, int64_t w_stride, int64_t depth, const float* a, int64_t pitch,
               bool ahead, float* sums) {
  constexpr int64_t kStep = Dot ? 2 * kWidth : kWidth;
  VF acc[Rows][Cols];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) acc[r][c] = set1(0.0f);
  const auto step = [&](int64_t left) __attribute__((always_inline)) {
    VF b[Cols];
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) {
      if (ahead) __builtin_prefetch(w + (Cols + c) * w_stride, 0, 2);
      b[c] = row_words<T, Dot>(w + c * w_stride, left);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const VF x = load(a + r * pitch);
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) acc[r][c] = add_words<Dot>(acc[r][c], b[c], x);
    }
    w += kStep, a += kWidth;
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) step(kStep);
  if (k < depth) step(depth - k);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Cols == 4) {
      hsum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], sums + r * kMoePitch);
    } else {
      for (int c = 0; c < Cols; ++c) sums[r * kMoePitch + c] = hsum(acc[r][c]);
    }
  }
}

template <class T, bool Dot, int Cols>
void dot_rows(int64_t rows, const T* w, int64_t w_stride, int64_t depth, const float* a,
              int64_t pitch, bool ahead, float* sums) {
  const auto run = [&]<int Rows>() {
    dot_block<T, Dot, Cols, Rows>(w, w_stride, depth, a, pitch, ahead, sums);
  };
  if (rows == 1) return run.template operator()<1>();
  if constexpr (kDotRows == 2) return run.template operator()<2>();
  if (rows == 2) return run.template operator()<2>();
  if (rows == 3) return run.template operator()<3>();
  if (rows == 4) return run.template operator()<4>();
  if (rows == 5) return run.template operator()<5>();
  return run.template operator()<6>();
}

template <class T, bool Dot>
void product_dots(const MoeProduct& p) {
  const int64_t pitch = round_up(words<Dot>(p.depth), 16);
  for (int64_t r = 0; r < p.rows; ++r) {
    float* const to = p.room + r * pitch;
    row_to_words<T, Dot>(row_at<T>(p.a, p.first + r), p.depth, to);
    for (int64_t i = words<Dot>(p.depth); i < pitch; ++i) to[i] = 0.0f;
  }
  const T* w = static_cast<const T*>(p.w);
  // Groups of rows as equal as can be: fewer sums would wait for each other.
  const int64_t groups = (p.rows + kDotRows - 1) / kDotRows;
  for (int64_t c = 0; c < p.cols;) {
    const bool whole = c + kDotCols <= p.cols;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t r = g * p.rows / groups, n = (g + 1) * p.rows / groups - r;
      const float* const a = p.room + r * pitch;
      float* const sums = p.sums + r * kMoePitch + c;
      if (whole) {
        dot_rows<T, Dot, kDotCols>(n, w, p.w_stride, p.depth, a, pitch, g == 0, sums);
      } else {
        dot_rows<T, Dot, 1>(n, w, p.w_stride, p.depth, a, pitch, false, sums);
      }
    }
    const int64_t done = whole ? kDotCols : 1;
    c += done, w += done * p.w_stride;
  }
}

// So few slots are summed in registers, kDown rows at a time, straight into the result: packing
// and a tile of sums would be more bytes than the result itself.
constexpr int64_t kFewSlots = 16;
#if defined(TENFOLD_ISA_AVX512)
constexpr int kDown = 8;  // 16 sums, 2 vectors of a
#else
constexpr int kDown = 4;
#endif

template <class T>
void wgrad_few(const MoeWgrad& p) {
  const T* a[kFewSlots];
  for (int64_t s = 0; s < p.slots; ++s) a[s] = row_at<T>(p.a, p.first + s) + p.col;
  for (int64_t r = 0; r < p.rows; r += kDown) {
    const int rows = static_cast<int>(p.rows - r < kDown ? p.rows - r : kDown);
    float by[kFewSlots][8] = {};
    for (int64_t s = 0; s < p.slots; ++s)
      row_to_float(row_at<T>(p.dy, p.first + s) + p.row + r, rows, by[s]);
    T* const out = static_cast<T*>(p.out) + r * p.out_stride;
    const auto sum = [&](auto read, auto write) __attribute__((always_inline)) {
      VF sums[kDown][2];
#pragma GCC unroll 8
      for (auto& row : sums) row[0] = row[1] = set1(0.0f);
      for (int64_t s = 0; s < p.slots; ++s) {
        VF x[2];
        read(a[s], x);
#pragma GCC unroll 8
        for (int d = 0; d < kDown; ++d) {
          const VF y = set1(by[s][d]);
          sums[d][0] = fma(x[0], y, sums[d][0]);
          sums[d][1] = fma(x[1], y, sums[d][1]);
        }
      }
      for (int d = 0; d < rows; ++d) write(out + d * p.out_stride, sums[d]);
    };
    int64_t c = 0;
    for (; c + 2 * kWidth <= p.cols; c += 2 * kWidth) {
      sum([&](const T* from, VF(&x)[2]) { get_two<false>(from + c, x); },
          [&](T* to, const VF(&x)[2]) {
            put_two<false>(to + c, x, p.past_caches && is_aligned(to + c));
          });
    }
    for (; c < p.cols; c += kWidth) {
      const int n = static_cast<int>(p.cols - c < kWidth ? p.cols - c : kWidth);
      sum([&](const T* from, VF(&x)[2]) { x[0] = x[1] = load_n(from + c, n); },
          [&](T* to, const VF(&x)[2]) { store_n(to + c, x[0], n); });
    }
  }
}

template <class T, bool Dot>
void wgrad_tile(const MoeWgrad& p) {
  const Packed m(p.room);
  if (p.slots == 0) clear(p.sums, p.rows, p.cols);
  for (int64_t q = 0; q < p.slots; q += kStripDepth<Dot>) {
    const int64_t n = p.slots - q < kStripDepth<Dot> ? p.slots - q : kStripDepth<Dot>;
    const auto from = [&](const MoeRows& rows, int64_t col) {
      return
          [&rows, col, first = p.first + q](int64_t i) { return row_at<T>(rows, first + i) + col; };
    };
    pack_columns_along<T, Dot>(from(p.dy, p.row), n, p.rows, kPanels<Dot>, m.panels);
    pack_tiles_along<T, Dot>(from(p.a, p.col), n, p.cols, kLanes, m.lanes);
    multiply_strip<Dot>(m, p.rows, p.cols, n, q > 0, p.sums);
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    T* const to = static_cast<T*>(p.out) + r * p.out_stride;
    const float* const sums = p.sums + r * kMoePitch;
    int64_t c = 0;
    if (p.past_caches && is_aligned(to))
      for (; c + 2 * kWidth <= p.cols; c += 2 * kWidth)
        put_two<true>(to + c, {load(sums + c), load(sums + c + kWidth)}, true);
    for (; c + kWidth <= p.cols; c += kWidth) store(to + c, load(sums + c));
    if (c < p.cols) store_n(to + c, load(sums + c), static_cast<int>(p.cols - c));
  }
}

}  // namespace

void moe_product(const MoeProduct& p) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    const bool few = kByTiles<Dot> ? p.rows <= kMoeFewest : moe_few_rows(p.rows, p.depth);
    if (p.by_rows && !p.add && p.depth >= 4 * kWidth && few) return product_dots<T, Dot>(p);
#if defined(TENFOLD_ISA_AMX)
    if constexpr (Dot)
      if (p.by_rows && !p.add && p.depth > 0) return Turned(p).run();
#endif
    product_packed<T, Dot>(p);
  });
}

void moe_wgrad(const MoeWgrad& p) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    if (p.slots <= kFewSlots) {
      wgrad_few<T>(p);
    } else {
      wgrad_tile<T, Dot>(p);
    }
  });
  if (p.past_caches) stream_fence();
}

TENFOLD_ISA_END
