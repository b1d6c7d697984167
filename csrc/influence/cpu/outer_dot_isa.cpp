// SPDX-License-Identifier: Apache-2.0
// See influence/outer_dot.h.
#include "core/cpu/packed.h"
#include "influence/outer_dot.h"

TENFOLD_ISA_BEGIN
namespace {

// Words that are added one after another: of a score many roundings of a product's sums meet.
constexpr int64_t kDotRun = 64;

static_assert(kDotCols % kTileRows == 0 && kDotRows % 16 == 0 && kDotStrip % kStrip == 0);

template <bool Dot>
constexpr int64_t kPanelStride = kPackRows<Dot> * kDotStrip + kDotPad;
constexpr int64_t kLaneStride = kTileRows * kDotStrip + kDotPad;
template <bool Dot>
constexpr int64_t kDepth = Dot ? 2 * kDotStrip : kDotStrip;

// Where a chunk's operands are packed, its two products, and the scores of a task.
struct Memory {
  float *panels, *lanes, *staged, *one, *other;
  double* scores;
  explicit Memory(float* room)
      : panels(room),
        lanes(panels + kDotPanels),
        staged(lanes + kDotLanes),
        one(staged + 16 * kDotStrip),
        other(one + kDotRows * kDotPitch),
        scores(reinterpret_cast<double*>(other + kDotRows * kDotPitch)) {}
};

// Tokens of a task's examples, one after the other.
template <class T>
struct Side {
  const T* data;
  int64_t example, token, per_example;

  Side(const TokenRows& rows, int64_t first, int64_t tokens)
      : data(static_cast<const T*>(rows.data) + first * rows.example),
        example(rows.example),
        token(rows.token),
        per_example(tokens) {}
  const T* operator[](int64_t i) const {
    return data + i / per_example * example + i % per_example * token;
  }
};

// Tokens [row, row + rows) of a side times tokens [col, col + cols) of the other.
template <class T, bool Dot>
void multiply_chunk(const Side<T>& left, int64_t row, int64_t rows, const Side<T>& right,
                    int64_t col, int64_t cols, int64_t depth, const Memory& m, float* sums) {
  for (int64_t r = 0; depth == 0 && r < rows; ++r)
    for (int64_t c = 0; c < cols; c += kWidth) store(sums + r * kDotPitch + c, set1(0.0f));
  for (int64_t k = 0; k < depth; k += kDepth<Dot>) {
    const int64_t n = depth - k < kDepth<Dot> ? depth - k : kDepth<Dot>;
    for (int64_t r = 0; r < rows; r += kPackRows<Dot>) {
      const T* from[kPackRows<Dot>] = {};
      for (int64_t i = 0; i < kPackRows<Dot> && r + i < rows; ++i) from[i] = left[row + r + i] + k;
      pack_panel<T, Dot>(from, n, m.staged, m.panels + r / kPackRows<Dot> * kPanelStride<Dot>);
    }
    for (int64_t c = 0; c < cols; c += kTileRows) {
      const T* from[kTileRows] = {};
      for (int64_t i = 0; i < kTileRows && c + i < cols; ++i) from[i] = right[col + c + i] + k;
      const int64_t left_over = round_up(cols - c, kWidth);
      pack_tile<T, Dot>(from, n, m.staged, m.lanes + c / kTileRows * kLaneStride,
                        left_over < kTileRows ? left_over : kTileRows);
    }
    const int64_t words = packed_words<Dot>(n);
    for (int64_t w = 0; w < words; w += kDotRun)
      multiply_packed<Dot>(m.panels + w * kPackRows<Dot>, kPanelStride<Dot>, rows,
                           m.lanes + w * kTileRows, kLaneStride, cols,
                           words - w < kDotRun ? words - w : kDotRun, sums, kDotPitch, k + w > 0);
  }
}

inline float sum_of_products(const float* a, const float* b, int64_t n) {
  VF sum = set1(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) {
    const int left = static_cast<int>(n - i);
    sum = fma(load_n(a + i, left), load_n(b + i, left), sum);
  }
  return hsum(sum);
}

// Adds the products of a chunk to the scores of its pairs, of `across` a row.
void add_scores(const Memory& m, int64_t row, int64_t rows, int64_t t, int64_t col, int64_t cols,
                int64_t s, int64_t across) {
  for (int64_t r = 0; r < rows; ++r) {
    double* const scores = m.scores + (row + r) / t * across;
    const float *const a = m.one + r * kDotPitch, *const b = m.other + r * kDotPitch;
    for (int64_t c = 0; c < cols;) {
      const int64_t at = col + c, next = (at / s + 1) * s - col;
      const int64_t end = next < cols ? next : cols;
      scores[at / s] += static_cast<double>(sum_of_products(a + c, b + c, end - c));
      c = end;
    }
  }
}

template <class T, bool Dot>
void run_packed(const OuterDot& p, const DotTask& task, const Memory& m) {
  const Side<T> j(p.j, task.i, p.t), x(p.x, task.i, p.t);
  const Side<T> j2(p.j2, task.k, p.s), x2(p.x2, task.k, p.s);
  const int64_t all_rows = task.rows * p.t, all_cols = task.cols * p.s;
  for (int64_t row = 0; row < all_rows; row += kDotRows)
    for (int64_t col = 0; col < all_cols; col += kDotCols) {
      const int64_t rows = all_rows - row < kDotRows ? all_rows - row : kDotRows;
      const int64_t cols = all_cols - col < kDotCols ? all_cols - col : kDotCols;
      multiply_chunk<T, Dot>(j, row, rows, j2, col, cols, p.v, m, m.one);
      multiply_chunk<T, Dot>(x, row, rows, x2, col, cols, p.d, m, m.other);
      add_scores(m, row, rows, p.t, col, cols, p.s, task.cols);
    }
}

template <class T>
inline float dot_rows(const T* a, const T* b, int64_t n) {
  VF sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[v] = fma(load(a + i + v * kWidth), load(b + i + v * kWidth), sum[v]);
  for (; i < n; i += kWidth) {
    const int left = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    sum[0] = fma(load_n(a + i, left), load_n(b + i, left), sum[0]);
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
double pair_score(const OuterDot& p, int64_t i, int64_t k) {
  const Side<T> j(p.j, i, p.t), x(p.x, i, p.t), j2(p.j2, k, p.s), x2(p.x2, k, p.s);
  double score = 0.0;
  for (int64_t t = 0; t < p.t; ++t)
    for (int64_t s = 0; s < p.s; ++s)
      score += static_cast<double>(dot_rows(j[t], j2[s], p.v)) *
               static_cast<double>(dot_rows(x[t], x2[s], p.d));
  return score;
}

}  // namespace

void outer_dot_task(const OuterDot& p, const DotTask& task, float* room) {
  const auto put = [&](int64_t i, int64_t k, double score) {
    p.out[p.paired ? task.i + i : (task.i + i) * p.m + task.k + k] = static_cast<float>(score);
  };
  const int64_t cols = p.paired ? 1 : task.cols;
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    if (p.direct || p.t == 0 || p.s == 0) {
      for (int64_t i = 0; i < task.rows; ++i)
        for (int64_t k = 0; k < cols; ++k) put(i, k, pair_score<T>(p, task.i + i, task.k + k));
      return;
    }
    const Memory m(room);
    for (int64_t i = 0; i < task.rows * cols; ++i) m.scores[i] = 0.0;
    run_packed<T, Dot>(p, {task.i, task.rows, task.k, cols}, m);
    for (int64_t i = 0; i < task.rows; ++i)
      for (int64_t k = 0; k < cols; ++k) put(i, k, m.scores[i * cols + k]);
  });
}

TENFOLD_ISA_END
