// SPDX-License-Identifier: Apache-2.0
// See linear_tiles.h.
#include "core/cpu/packed.h"
#include "core/cpu/pairs.h"
#include "loss/cpu/linear_tiles.h"
#include "loss/linear_cross_entropy.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr float kLowest = -3.402823466e38f;
static_assert(kLceLanes % kTileRows == 0);

inline int64_t lane_stride(int64_t depth) {
  return kTileRows * depth + kLcePad;
}

template <class T>
inline const T* row_of(const void* from, int64_t stride, int64_t row) {
  return static_cast<const T*>(from) + row * stride;
}

// d of a logit from the logit, lane by lane for rows.
struct Delta {
  VF scale, cap, uncap, most;
  bool capped;
  const LceChunk& c;

  Delta(const LceProblem& p, const LceChunk& c)
      : scale(set1(p.scale)),
        cap(set1(p.softcap)),
        uncap(set1(1.0f / p.softcap)),
        most(set1(-kLowest)),
        capped(p.softcap > 0.0f),
        c(c) {}

  // Rows from m on; `id`: added where the target is.
  inline VF operator()(VF x, int64_t m, VF id) const {
    const VF log_p = fma(x, scale, set1(0.0f) - load(c.lse + m)), e = exp(log_p);
    VF slope = load(c.of_p + m);
    if (c.of_entropy != nullptr) {
      const VF d = set1(0.0f) - (load(c.entropy + m) + log_p);  // infinite where p is 0
      slope = fma(load(c.of_entropy + m), select(lt(most, d), set1(0.0f), d), slope);
    }
    const VF y = fma(e, slope, id);
    if (!capped) return y;
    return ((cap - x) * uncap) * ((cap + x) * uncap) *
           y;  // 1 - tanh^2, without cancellation near 1
  }
};

constexpr int kSpan = kWidth < 8 ? 8 : kWidth;  // rows of a block of 8 tokens

template <bool Dot>
inline void put_by_row(const float* d, float* to, int64_t stride) {
  for (int half = 0; half < kSpan / 8; ++half, to += stride, d += 8) {
    if constexpr (Dot) {
#if defined(TENFOLD_ISA_BF16)
      if (half > 0) break;
      for (int i = 0; i < 4; ++i) {
        const VF pairs = to_pairs(load(d + 2 * i * kSpan), load(d + (2 * i + 1) * kSpan));
        _mm256_storeu_ps(to + i * 8, _mm512_castps512_ps256(pairs.v));
        _mm256_storeu_ps(to + stride + i * 8, _mm512_extractf32x8_ps(pairs.v, 1));
      }
#endif
    } else {
      for (int i = 0; i < 8; ++i) __builtin_memcpy(to + i * 8, d + i * kSpan, 32);
    }
  }
}

template <bool Dot>
inline void put_by_token(const float* d, float* to) {
  if constexpr (Dot) {
#if defined(TENFOLD_ISA_BF16)
    alignas(64) float pairs[8 * 8];
    for (int i = 0; i < 8; ++i)
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs + i * 8),
                         (__m256i)_mm512_cvtneps_pbh(load(d + i * kSpan).v));
    transpose8(pairs, 8, to, 8);
#endif
  } else {
    for (int half = 0; half < kSpan; half += 8) transpose8(d + half, kSpan, to + half * 8, 8);
  }
}

// Element `along` the depth of row `lane` of a panel.
template <bool Dot>
inline void put_one(float* panel, int64_t along, int64_t lane, float x) {
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) {
    float* const row = panel + along / kAmxDepth * kAmxTile + lane * kAmxWords;
    return store_n(reinterpret_cast<bf16_t*>(row) + along % kAmxDepth, set1(x), 1);
  }
#endif
  if constexpr (Dot) {
    store_n(reinterpret_cast<bf16_t*>(panel + along / 2 * 8 + lane) + along % 2, set1(x), 1);
  } else {
    panel[along * 8 + lane] = x;
  }
}

// From one panel of tokens to the next.
template <bool Dot>
inline int64_t token_stride(const LceChunk& c) {
  return lce_panel_stride(packed_words<Dot>(lce_whole(c.count, 16)), kPackRows<Dot>);
}

#if defined(TENFOLD_ISA_AMX)
// Blocks of 32 tokens x 16 rows: a tile of rows, and halves of the rows of two tiles of tokens.
template <class Deltas>
void put_tiles(const Deltas& deltas, int64_t rows, int64_t n, float* by_row, int64_t stride,
               float* by_token, int64_t token_stride) {
  const VF none = set1(0.0f);
  const auto store_half = [](float* to, __m256i half) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  };
  for (int64_t v = 0; v < n; v += kAmxDepth)
    for (int64_t m = 0; m < rows; m += 16) {
      alignas(64) float pairs[kAmxTile];
      const bool is_last = m + 16 == rows && m % kAmxDepth == 0;
      for (int i = 0; i < kAmxDepth; i += 2) {
        const auto at = [&](int j) __attribute__((always_inline)) {
          return v + j < n ? deltas(v + j, m) : none;
        };
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(at(i + 1).v, at(i).v);
        if (by_row != nullptr) store(pairs + i / 2 * 16, pair_halves(both));
        if (by_token == nullptr) continue;
        float* const to = by_token + (v + i) / 16 * token_stride + m / kAmxDepth * kAmxTile +
                          i % 16 * kAmxWords + m % kAmxDepth / 2;
        store_half(to, _mm512_castsi512_si256(both));
        store_half(to + kAmxWords, _mm512_extracti64x4_epi64(both, 1));
        if (!is_last) continue;
        store_half(to + 8, __m256i{});
        store_half(to + kAmxWords + 8, __m256i{});
      }
      if (by_row != nullptr)
        transpose16([&](int i) { return pairs + i * 16; },
                    by_row + m / 16 * stride + v / kAmxDepth * kAmxTile, kAmxWords);
    }
}
#endif

template <bool Dot, class Deltas>
void put_by_eight(const Deltas& deltas, int64_t rows, int64_t n, float* by_row, int64_t stride,
                  float* by_token, int64_t token_stride) {
  constexpr int kWord = Dot ? 2 : 1;
  const VF none = set1(0.0f);
  alignas(64) float d[8 * kSpan];
  for (int64_t v = 0; v < n; v += 8)
    for (int64_t m = 0; m < rows; m += kSpan) {
      for (int i = 0; i < 8; ++i)
        for (int lane = 0; lane < kSpan; lane += kWidth)
          store(d + i * kSpan + lane, v + i < n ? deltas(v + i, m + lane) : none);
      if (by_row != nullptr) put_by_row<Dot>(d, by_row + m / 8 * stride + v / kWord * 8, stride);
      if (by_token != nullptr)
        put_by_token<Dot>(d, by_token + v / 8 * token_stride + m / kWord * 8);
    }
}

// Packs deltas(v, m), those of token v and the rows from m on, for one or both products.
template <bool Dot, class Deltas>
void put_deltas(const LceChunk& c, const Deltas& deltas, int64_t n, float* by_row, int64_t stride,
                float* by_token) {
  const int64_t rows = lce_whole(c.count, 16), by = token_stride<Dot>(c);
#if defined(TENFOLD_ISA_AMX)
  if constexpr (Dot) return put_tiles(deltas, rows, n, by_row, stride, by_token, by);
#endif
  put_by_eight<Dot>(deltas, rows, n, by_row, stride, by_token, by);
}

// f(row, token less first) of targets among n tokens.
template <class F>
inline void for_targets(const LceChunk& c, int64_t first, int64_t n, const F& f) {
  for (int64_t m = 0; m < c.count; ++m)
    if (const int64_t v = c.target[m] - first; v >= 0 && v < n) f(m, v);
}

template <bool Dot>
void make_deltas(const LceProblem& p, const LceChunk& c, int64_t first, int64_t n, const float* x,
                 int64_t pitch, float* by_row, int64_t stride, float* by_token) {
  const Delta delta(p, c);
  constexpr int kRows = kPackRows<Dot>;
  const VF none = set1(0.0f);
  put_deltas<Dot>(
      c, [&](int64_t v, int64_t m) { return delta(load(x + v * pitch + m), m, none); }, n, by_row,
      stride, by_token);
  // Where the target is, with one rounding.
  for_targets(c, first, n, [&](int64_t m, int64_t v) {
    float one[kWidth];
    const int64_t lane = m % kWidth;
    for (int i = 0; i < kWidth; ++i) one[i] = i == lane ? c.of_id[m] : 0.0f;
    store(one, delta(load(x + v * pitch + m - lane), m - lane, load(one)));
    if (by_row != nullptr) put_one<Dot>(by_row + m / kRows * stride, v, m % kRows, one[lane]);
    if (by_token != nullptr)
      put_one<Dot>(by_token + v / kRows * token_stride<Dot>(c), m, v % kRows, one[lane]);
  });
}

// An exponential, at most 1 or NaN, as 8 bits of exponent and 8 of significand: one more than bf16
// has, in the place of the sign.
inline void put_exp(uint16_t* to, VF e) {
  store_halves(to, shr<15>(bits(e) + seti(1u << 14)) & seti(0xFFFFu));
}
inline VF get_exp(const uint16_t* from) {
  return from_bits(shr<1>(bits(load(reinterpret_cast<const bf16_t*>(from)))));
}

// Of rows: maximum of their logits, sum of exp, and of exp times distance from the maximum. Where
// exps are kept, those of a token go to rows `exps.pitch` apart.
template <bool kKeep>
inline void sums_of(const float* x, int64_t pitch, int64_t n, VF scale, bool weighted,
                    const LceExps& exps, float* max, float* sum, float* by_distance) {
  VF top[2] = {set1(kLowest), set1(kLowest)};
  for (int64_t v = 0; v < n; ++v) top[v % 2] = vmax(top[v % 2], load(x + v * pitch));
  top[0] = vmax(top[0], top[1]);
  const VF lowest = set1(kLowest);
  VF total[2] = {set1(0.0f), set1(0.0f)}, distance[2] = {set1(0.0f), set1(0.0f)};
  for (int64_t v = 0; v < n; ++v) {
    const VF d = (load(x + v * pitch) - top[0]) * scale, e = exp(d);
    total[v % 2] = total[v % 2] + e;
    if constexpr (kKeep) put_exp(exps.data + v * exps.pitch, e);
    if (weighted)  // not -inf times 0
      distance[v % 2] = fma(select(lt(d, lowest), set1(0.0f), d), e, distance[v % 2]);
  }
  store(max, top[0] * scale);
  store(sum, total[0] + total[1]);
  if (weighted) store(by_distance, distance[0] + distance[1]);
}

// n floats to a row of the dtype; past the caches where the row's lines are whole.
inline void store_row(const float* from, int64_t n, Dtype dtype, void* to, bool past) {
  const auto all = [&]<class T>(T* out) {
    int64_t i = 0;
    const auto some = [&](int64_t end) {
      for (; i + kWidth <= end; i += kWidth) store_quick(out + i, load(from + i));
      if (i < end)
        store_n(out + i, load_n(from + i, static_cast<int>(end - i)), static_cast<int>(end - i));
      i = end;
    };
    if (past) {
      constexpr uintptr_t kLine = 64;
      const auto before = (kLine - reinterpret_cast<uintptr_t>(out) % kLine) % kLine / sizeof(T);
      some(static_cast<int64_t>(before) < n ? static_cast<int64_t>(before) : n);
      for (; i + 2 * kWidth <= n; i += 2 * kWidth)
        put_two<true>(out + i, {load(from + i), load(from + i + kWidth)}, true);
    }
    some(n);
  };
  if (dtype == Dtype::f32) return all(static_cast<float*>(to));
  if (dtype == Dtype::bf16) return all(static_cast<bf16_t*>(to));
  all(static_cast<fp16_t*>(to));
}

}  // namespace

LcePacking lce_packing(Dtype dtype) {
  return with_dtype(dtype, []<class T, bool Dot>() -> LcePacking {
    return {Dot ? 2 : 1, kPackWords<Dot>, kPackRows<Dot>, kByTiles<Dot> ? 32 : kLceTile};
  });
}

void lce_pack_lanes(const LceProblem& p, const LceChunk& c, int64_t tile, float* staged) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    const int64_t end = (tile + 1) * kLceLanes < c.count ? (tile + 1) * kLceLanes : c.count;
    for (int64_t m = tile * kLceLanes; m < end; m += kTileRows) {
      const T* row[kTileRows] = {};
      for (int i = 0; i < kTileRows && m + i < c.count; ++i)
        row[i] = row_of<T>(p.hidden, p.hidden_stride, c.row[m + i]);
      pack_tile<T, Dot>(row, p.dim, staged,
                        c.lanes + m / kTileRows * lane_stride(packed_words<Dot>(p.dim)));
    }
  });
}

void lce_pack_cols(const LceProblem& p, const LceChunk& c, int64_t col, int64_t n) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    const int64_t stride = lane_stride(packed_words<Dot>(c.count));
    pack_tiles_along<T, Dot>(
        [&](int64_t i) { return row_of<T>(p.hidden, p.hidden_stride, c.row[i]) + col; }, c.count, n,
        stride, c.cols + col / kTileRows * stride);
  });
}

#if defined(TENFOLD_ISA_AMX)
// Rows of weight are left tiles as they lie.
void logits_by_tiles(const LceProblem& p, const LceChunk& c, int64_t v, int64_t n, float* spare,
                     float* x) {
  constexpr int64_t kBlock = 128;
  const int64_t depth = amx_words(p.dim);
  const AmxTiles registers;
  multiply_rows({row_of<bf16_t>(p.weight, p.weight_stride, v), p.weight_stride, n}, p.dim, kBlock,
                amx_strip(depth), spare, c.lanes, lane_stride(depth), c.count, x, c.pitch, false,
                [&](int64_t, int64_t rows, float* sums) { return sums + rows * c.pitch; });
}
#endif

void lce_logits(const LceProblem& p, const LceChunk& c, int64_t v, int64_t n, float* panels,
                float* staged, float* x) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
#if defined(TENFOLD_ISA_AMX)
    if constexpr (Dot) return logits_by_tiles(p, c, v, n, panels, x);
#endif
    constexpr int kRows = kPackRows<Dot>;
    const int64_t depth = packed_words<Dot>(p.dim), stride = lce_panel_stride(depth, kRows);
    for (int64_t r = 0; r < n; r += kRows) {
      const T* row[kRows] = {};
      for (int i = 0; i < kRows && r + i < n; ++i)
        row[i] = row_of<T>(p.weight, p.weight_stride, v + r + i);
      pack_panel<T, Dot>(row, p.dim, staged, panels + r / kRows * stride);
    }
    multiply_packed<Dot>(panels, stride, n, c.lanes, lane_stride(depth), c.count, depth, x, c.pitch,
                         false);
  });
  if (p.softcap > 0.0f) {
    const VF cap = set1(p.softcap), inverse = set1(1.0f / p.softcap);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t m = 0; m < c.count; m += kWidth) {
        float* const at = x + r * c.pitch + m;
        store(at, tanh(load(at) * inverse) * cap);
      }
  }
  for (int64_t m = 0; m < c.count; ++m)
    if (c.target[m] >= v && c.target[m] < v + n) c.chosen[m] = x[(c.target[m] - v) * c.pitch + m];
}

void lce_sums(const LceProblem& p, const LceChunk& c, int64_t n, const float* x, bool weighted,
              const LceExps& exps, float* sums) {
  for (int64_t m = 0; m < lce_whole(c.count, 16); m += kWidth) {
    const auto of_rows = exps.data != nullptr ? sums_of<true> : sums_of<false>;
    of_rows(x + m, c.pitch, n, set1(p.scale), weighted, {exps.data + m, exps.pitch}, sums + m,
            sums + c.pitch + m, sums + 2 * c.pitch + m);
  }
}

void lce_join(const LceChunk& c, int64_t tiles, bool weighted, float* sums) {
  const int64_t pitch = c.pitch, tile = 3 * pitch;
  for (int64_t m = 0; m < c.count; m += kWidth) {
    float* const first = sums + m;
    VF top = load(first);
    for (int64_t t = 1; t < tiles; ++t) top = vmax(top, load(first + t * tile));
    VF sum = set1(0.0f), distance = set1(0.0f);
    for (int64_t t = 0; t < tiles; ++t) {
      const float* const from = first + t * tile;
      const VF d = load(from) - top, factor = exp(d), part = load(from + pitch);
      sum = fma(part, factor, sum);
      if (weighted) distance = fma(fma(part, d, load(from + 2 * pitch)), factor, distance);
    }
    store(first, top);
    store(first + pitch, sum);
    if (weighted) store(first + 2 * pitch, distance);
  }
}

void lce_keep(const LceChunk& c, int64_t n, const float* x, float* kept, int64_t kept_pitch) {
  for (int64_t r = 0; r < n; ++r, x += c.pitch, kept += kept_pitch)
    for (int64_t m = 0; m < lce_whole(c.count, 16); m += kWidth) store(kept + m, load(x + m));
}

void lce_deltas(const LceProblem& p, const LceChunk& c, int64_t v, int64_t n, const float* x,
                int64_t x_pitch, float* by_row, int64_t stride, float* by_token) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    make_deltas<Dot>(p, c, v, n, x, x_pitch, by_row, stride, by_token);
  });
}

void lce_row_factors(const LceChunk& c, const float* top, const float* base, float* factor) {
  for (int64_t m = 0; m < lce_whole(c.count, 16); m += kWidth) {
    const VF t = vmax(set1(-1e30f), load(top + m) * set1(kLog2e)), n = rint(t);
    store(factor + m, exp2_of_parts(vmax(set1(-151.0f), n - load(base + m)), t - n));
  }
}

void lce_exps_by_row(Dtype dtype, const LceChunk& c, int64_t first, int64_t n, const LceExps& exps,
                     const float* factor, float* by_row, int64_t stride) {
  with_dtype(dtype, [&]<class T, bool Dot>() {
    put_deltas<Dot>(
        c,
        [&](int64_t v, int64_t m) {
          return get_exp(exps.data + v * exps.pitch + m) * load(factor + m);
        },
        n, by_row, stride, nullptr);
    for_targets(c, first, n, [&](int64_t m, int64_t v) {
      put_one<Dot>(by_row + m / kPackRows<Dot> * stride, v, m % kPackRows<Dot>, 0.0f);
    });
  });
}

void lce_exps_by_token(const LceProblem& p, const LceChunk& c, int64_t first, int64_t n,
                       const LceExps& exps, const float* top, float* factor, float* by_token) {
  for (int64_t m = 0; m < lce_whole(c.count, 16); m += kWidth) {
    const VF t = load(top + m), lse = load(c.lse + m);  // both may be infinite
    store(factor + m, exp(select(eq(t, lse), set1(0.0f), t - lse)) * load(c.of_p + m));
  }
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    put_deltas<Dot>(
        c,
        [&](int64_t v, int64_t m) {
          return get_exp(exps.data + v * exps.pitch + m) * load(factor + m);
        },
        n, nullptr, 0, by_token);
    // Where the target is, with one rounding: what is left of 1 may be small.
    for_targets(c, first, n, [&](int64_t m, int64_t v) {
      float one[kWidth];
      store(one, fma(exp(set1(c.chosen[m])), set1(c.of_p[m]), set1(c.of_id[m])));
      constexpr int kRows = kPackRows<Dot>;
      put_one<Dot>(by_token + v / kRows * token_stride<Dot>(c), m, v % kRows, one[0]);
    });
  });
}

bool lce_finish_row(const LceProblem& p, int64_t target, float factor, float of_target,
                    float* sums) {
  return with_dtype(p.dtype, [&]<class T, bool Dot>() {
    const T* const row = row_of<T>(p.weight, p.weight_stride, target);
    const VF by = set1(factor), of = set1(of_target);
    VF rest = set1(0.0f);
    for (int64_t i = 0; i < p.dim; i += kWidth) {
      const VF x = load(sums + i);
      rest = rest + (x - x);
      store(sums + i, fma(load_some(row + i, p.dim - i), of, x * by));
    }
    return !any(unordered(rest));
  });
}

void lce_pack_weight(const LceProblem& p, int64_t v, int64_t n, int64_t at, int64_t depth,
                     float* cols) {
  with_dtype(p.dtype, [&]<class T, bool Dot>() {
    pack_tiles_along<T, Dot>([&](int64_t i) { return row_of<T>(p.weight, p.weight_stride, v + i); },
                             n, p.dim, lane_stride(depth), cols + at * kTileRows);
  });
}

void lce_weight_tile(const LceChunk& c, Dtype dtype, const LceWeightTile& t) {
  const int64_t pitch = lce_pitch(lce_whole(t.cols, kLceLanes));
  with_dtype(dtype, [&]<class T, bool Dot>() {
    const int64_t depth = packed_words<Dot>(c.count), stride = lane_stride(depth);
    multiply_packed<Dot>(t.by_token, token_stride<Dot>(c), t.n, c.cols + t.col / kTileRows * stride,
                         stride, t.cols, depth, t.scratch, pitch, false);
  });
  const int64_t size = dtype_size(t.dtype);
  for (int64_t r = 0; r < t.n; ++r) {
    float* const sums = t.scratch + r * pitch;
    if (t.before != nullptr) {
      const float* const before = t.before + r * t.before_pitch;
      for (int64_t i = 0; i < t.cols; i += kWidth)
        store(sums + i, load(sums + i) + load_some(before + i, t.cols - i));
    }
    store_row(sums, t.cols, t.dtype, static_cast<char*>(t.out) + r * t.out_pitch * size, t.past);
  }
  if (t.past) stream_fence();
}

void lce_hidden_tile(Dtype dtype, int64_t rows, int64_t cols, int64_t depth, const float* by_row,
                     int64_t stride, const float* weight, int64_t weight_depth, int64_t col,
                     float* sums, int64_t pitch, bool add) {
  with_dtype(dtype, [&]<class T, bool Dot>() {
    const int64_t tile = lane_stride(weight_depth);
    multiply_packed<Dot>(by_row, stride, rows, weight + col / kTileRows * tile, tile, cols, depth,
                         sums, pitch, add);
  });
}

void lce_store(const float* from, int64_t n, Dtype dtype, void* to) {
  store_row(from, n, dtype, to, false);
}

TENFOLD_ISA_END
