// SPDX-License-Identifier: Apache-2.0
// Decode attention of one task: see decode.h. Per block of kDecodeKeyBlock tokens: logits (4 keys x
// up to 4 rows in registers, lanes along D) for every key head, running softmax of every row, then
// values (rows x vectors in registers, lanes along DV) for every value head.
#include "core/cpu/decode.h"
#include "core/cpu/math.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kRows = 4, kKeys = 4;
// Rows of a tile of values. Two of them leave registers for a whole row of v at 128 elements: it is
// read from end to end, as the hardware's prefetcher likes it. More rows read it again while it is
// in the first cache, every kValueTokens tokens.
constexpr int kValueRows = kWidth <= 8 ? 4 : 2;
constexpr int64_t kValueTokens = 64;

// Without it the compiler keeps accumulators on the stack between a loop and its remainder.
#define TENFOLD_UNROLL _Pragma("GCC unroll 16")

// The tokens of a block: where their keys and values are, heads not counted. A block that all rows
// see is taken as kStreams runs side by side, a token of each in turn: more prefetches of the
// hardware are under way at a time, and where one waits at the end of a page the others go on.
constexpr int kStreams = 4;
struct Block {
  int64_t first, num_keys;
  bool side_by_side;
  const char* k[kDecodeKeyBlock];
  const char* v[kDecodeKeyBlock];
};

// Rows that come next are fetched into the second cache, a line with every line that is worked on:
// keys and values take turns, and the hardware's prefetcher begins anew at each. The pace matters:
// a whole row at once fills the few buffers for misses of the first cache, and then the arithmetic
// waits behind them.
struct Ahead {
  const char* const* rows;  // [kDecodeKeyBlock]
  int64_t offset;           // bytes

  inline const char* row(int64_t j) const { return rows[j] + offset; }
};

// `row` at element i, if a line begins there.
template <class T>
inline void fetch(const char* row, int64_t i) {
  if (i * sizeof(T) % 64 == 0) __builtin_prefetch(row + i * sizeof(T), 0, 2);
}

// Walks over the runs of a task, a block at a time.
struct Cursor {
  int64_t run, at, first;
};

// Slot 4 i + s holds token s n / 4 + i.
void interleave(const char** rows, int64_t n) {
  const char* in_order[kDecodeKeyBlock];
  __builtin_memcpy(in_order, rows, n * sizeof(*rows));
  const int64_t part = n / kStreams;
  for (int64_t i = 0; i < part; ++i)
    for (int s = 0; s < kStreams; ++s) rows[i * kStreams + s] = in_order[s * part + i];
}

// [all_from, all_to): tokens that all rows see.
void next_block(const DecodeTask& t, int64_t size, int64_t all_from, int64_t all_to, Cursor* c,
                Block* block) {
  block->first = c->first;
  int64_t n = 0;
  while (n < kDecodeKeyBlock && c->run < t.num_runs) {
    const DecodeRun& run = t.runs[c->run];
    const int64_t left = run.num_keys - c->at, room = kDecodeKeyBlock - n;
    const int64_t take = left < room ? left : room;
    const char* k = static_cast<const char*>(run.k) + c->at * t.k_stride * size;
    const char* v = static_cast<const char*>(run.v) + c->at * t.v_stride * size;
    for (int64_t j = 0; j < take; ++j) {
      block->k[n + j] = k + j * t.k_stride * size;
      block->v[n + j] = v + j * t.v_stride * size;
    }
    n += take;
    c->at += take;
    if (c->at == run.num_keys) c->run += 1, c->at = 0;
  }
  block->num_keys = n;
  block->side_by_side = block->first >= all_from && block->first + n <= all_to && n % kStreams == 0;
  if (block->side_by_side) {
    interleave(block->k, n);
    interleave(block->v, n);
  }
  for (int64_t j = n; n > 0 && j < kDecodeKeyBlock; ++j) {
    block->k[j] = block->k[n - 1];  // so that all may be fetched
    block->v[j] = block->v[n - 1];
  }
  c->first += n;
}

// Logits of rows [r0, r0 + R) and keys [j0, j0 + 4) of one key head; missing keys are the last.
// Loops over rows and keys have constant bounds: the accumulators must not be indexed at run time,
// or they live on the stack.
template <class T, int R, bool kFetch>
void logits_tile(const DecodeTask& t, const Block& b, int64_t offset, int64_t r0, int64_t j0,
                 const Ahead& ahead) {
  const float* q[R];
  const T* key[kKeys];
  const int64_t pitch = decode_pitch(t.head_dim);
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) q[r] = t.q + (r0 + r) * pitch;
  const char* next[kKeys];
  TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) {
    key[j] = reinterpret_cast<const T*>(b.k[j0 + j]) + offset;
    next[j] = ahead.row(j0 + j);
  }
  VF acc[R][kKeys];
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j)
      acc[r][j] = set1(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= t.head_dim; i += kWidth) {
    VF x[kKeys];
    TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) {
      if constexpr (kFetch) fetch<T>(next[j], i);
      x[j] = load(key[j] + i);
    }
    TENFOLD_UNROLL for (int r = 0; r < R; ++r) {
      const VF y = load(q[r] + i);
      TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) acc[r][j] = fma(x[j], y, acc[r][j]);
    }
  }
  if (i < t.head_dim) {
    VF x[kKeys];
    TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) x[j] =
        load_n(key[j] + i, static_cast<int>(t.head_dim - i));
    TENFOLD_UNROLL for (int r = 0; r < R; ++r) {
      const VF y = load(q[r] + i);  // zero padded
      TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) acc[r][j] = fma(x[j], y, acc[r][j]);
    }
  }
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) hsum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3],
                                                   t.scratch + (r0 + r) * kDecodeKeyBlock + j0);
}

#if defined(TENFOLD_ISA_BF16)
constexpr int64_t kPair = 2 * kWidth;  // bf16 numbers of a vector

inline uint16_t* bf16_queries(const DecodeTask& t) {
  return reinterpret_cast<uint16_t*>(t.scratch + t.rows * kDecodeKeyBlock);
}
constexpr int64_t bf16_pitch(int64_t head_dim) {
  return (head_dim + kPair - 1) / kPair * kPair;
}

// The queries are bf16 numbers: exact.
void round_queries(const DecodeTask& t) {
  const int64_t pitch = decode_pitch(t.head_dim), to = bf16_pitch(t.head_dim);
  uint16_t* q = bf16_queries(t);
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t i = 0; i < to; i += kWidth)
      store(reinterpret_cast<bf16_t*>(q + r * to + i),
            i < pitch ? load(t.q + r * pitch + i) : set1(0.0f));
}

// bf16 dot products: exact products, float sums, and no conversion of the keys.
template <class T, int R, bool kFetch>
  requires(__is_same(T, bf16_t))
void logits_tile(const DecodeTask& t, const Block& b, int64_t offset, int64_t r0, int64_t j0,
                 const Ahead& ahead) {
  const uint16_t* q[R];
  const uint16_t* key[kKeys];
  const int64_t pitch = bf16_pitch(t.head_dim);
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) q[r] = bf16_queries(t) + (r0 + r) * pitch;
  const char* next[kKeys];
  TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) {
    key[j] = reinterpret_cast<const uint16_t*>(b.k[j0 + j]) + offset;
    next[j] = ahead.row(j0 + j);
  }
  VF acc[R][kKeys];
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j)
      acc[r][j] = set1(0.0f);
  int64_t i = 0;
  for (; i + kPair <= t.head_dim; i += kPair) {
    VI x[kKeys];
    TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) {
      if constexpr (kFetch) fetch<T>(next[j], i);
      x[j] = {_mm512_loadu_si512(key[j] + i)};
    }
    TENFOLD_UNROLL for (int r = 0; r < R; ++r) {
      const VI y = {_mm512_loadu_si512(q[r] + i)};
      TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) acc[r][j] = dot_bf16(acc[r][j], x[j], y);
    }
  }
  if (i < t.head_dim) {
    const auto some = static_cast<__mmask32>((uint64_t{1} << (t.head_dim - i)) - 1);
    VI x[kKeys];
    TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j)
        x[j] = {_mm512_maskz_loadu_epi16(some, key[j] + i)};
    TENFOLD_UNROLL for (int r = 0; r < R; ++r) {
      const VI y = {_mm512_loadu_si512(q[r] + i)};  // zero padded
      TENFOLD_UNROLL for (int j = 0; j < kKeys; ++j) acc[r][j] = dot_bf16(acc[r][j], x[j], y);
    }
  }
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) hsum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3],
                                                   t.scratch + (r0 + r) * kDecodeKeyBlock + j0);
}
#endif

// Logits of rows [r, r + R), R = min(4, end - r).
template <class T, bool kFetch>
inline void logits_of_rows(const DecodeTask& t, const Block& b, int64_t offset, int64_t r,
                           int64_t end, int64_t j, const Ahead& ahead) {
  if (end - r >= 4) return logits_tile<T, 4, kFetch>(t, b, offset, r, j, ahead);
  if (end - r == 3) return logits_tile<T, 3, kFetch>(t, b, offset, r, j, ahead);
  if (end - r == 2) return logits_tile<T, 2, kFetch>(t, b, offset, r, j, ahead);
  logits_tile<T, 1, kFetch>(t, b, offset, r, j, ahead);
}

template <class T>
void logits_of_head(const DecodeTask& t, const Block& b, const DecodeHead& head,
                    const Ahead& ahead) {
  const int64_t end = head.first_row + head.num_rows;
  for (int64_t j = 0; j < b.num_keys; j += kKeys) {
    logits_of_rows<T, true>(t, b, head.offset, head.first_row, end, j, ahead);
    for (int64_t r = head.first_row + kRows; r < end; r += kRows)
      logits_of_rows<T, false>(t, b, head.offset, r, end, j, ahead);
  }
}

// The biases of row r and a block's tokens, in their order there.
void order_bias(const DecodeTask& t, const Block& b, int64_t r, float* to) {
  const float* const bias = t.bias + b.first - r;
  const int64_t parts = b.side_by_side ? kStreams : 1, part = b.num_keys / parts;
  for (int64_t i = 0; i < part; ++i)
    for (int64_t s = 0; s < parts; ++s) to[i * parts + s] = bias[s * part + i];
  for (int64_t j = b.num_keys; j % kWidth != 0; ++j) to[j] = 0.0f;
}

// Turns a row of n dot products into weights relative to the running maximum; rescales what was
// summed. Tokens [from, to) of the block are seen.
void softmax_row(const DecodeTask& t, const Block& b, int64_t r, int64_t from, int64_t to) {
  const int64_t n = b.num_keys;
  float* logits = t.scratch + r * kDecodeKeyBlock;
  float bias[kDecodeKeyBlock];
  if (t.bias != nullptr) order_bias(t, b, r, bias);
  const VF hidden = from_bits(seti(0xFF800000u));
  const VF scale = set1(t.softcap > 0.0f ? t.scale / t.softcap : t.scale * kLog2e);
  const VF cap = set1(t.softcap * kLog2e);
  VF top = set1(t.max[r]);
  for (int64_t j = 0; j < n; j += kWidth) {
    VF x = load(logits + j) * scale;
    if (t.softcap > 0.0f) x = tanh(x) * cap;
    if (t.bias != nullptr) x = fma(load(bias + j), set1(kLog2e), x);
    if (j < from || j + kWidth > to) {
      const VI at = seti(static_cast<uint32_t>(j)) + iota();
      const VM seen = both(lt(at, seti(static_cast<uint32_t>(to))),
                           lt(seti(static_cast<uint32_t>(from - 1)), at));
      x = select(seen, x, hidden);
    }
    store(logits + j, x);
    top = vmax(top, x);
  }
  const float old = t.max[r], now = hmax(top) > old ? hmax(top) : old;
  VF sum = set1(0.0f);
  for (int64_t j = 0; j < n; j += kWidth) {
    const VF e = exp2(load(logits + j) - set1(now));
    store(logits + j, e);
    sum = sum + e;
  }
  if (now != old) {
    float factor[kWidth];
    store(factor, exp2(set1(old - now)));
    t.sum[r] *= factor[0];
    float* out = t.out + r * decode_pitch(t.value_dim);
    for (int64_t i = 0; i < decode_pitch(t.value_dim); i += kWidth)
      store(out + i, load(out + i) * set1(factor[0]));
    t.max[r] = now;
  }
  t.sum[r] += hsum(sum);
}

// Two vectors of values. Of bf16 they are taken out of the 128-bit lanes: one instruction each,
// where elements in order would take two. Their sums stay in that order until restore_order.
template <class T>
inline void load_two(const T* p, VF* a, VF* b) {
  *a = load(p);
  *b = load(p + kWidth);
}
#if defined(TENFOLD_ISA_AVX512)
inline void load_two(const bf16_t* p, VF* a, VF* b) {
  const __m512i both = _mm512_loadu_si512(p), zero = _mm512_setzero_si512();
  a->v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, both));
  b->v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, both));
}
#endif

template <class T>
void restore_order(const DecodeTask& t) {
#if defined(TENFOLD_ISA_AVX512)
  if (!__is_same(T, bf16_t)) return;
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t r = 0; r < t.rows; ++r) {
    float* out = t.out + r * decode_pitch(t.value_dim);
    for (int64_t i = 0; i + 2 * kWidth <= t.value_dim; i += 2 * kWidth) {
      const VF first = load(out + i), second = load(out + i + kWidth);
      store(out + i, {_mm512_permutex2var_ps(first.v, low, second.v)});
      store(out + i + kWidth, {_mm512_permutex2var_ps(first.v, high, second.v)});
    }
  }
#else
  (void)t;
#endif
}

// out[rows][i0 .. i0 + V vectors) += weights * v over tokens [from, to) of the block; kPart: its
// only vector is not whole.
template <class T, int R, int V, bool kPart, bool kFetch>
void values_tile(const DecodeTask& t, const Block& b, int64_t offset, const int32_t* rows,
                 int64_t i0, int64_t from, int64_t to, const Ahead& ahead) {
  const int64_t pitch = decode_pitch(t.value_dim);
  const int last = static_cast<int>(t.value_dim - i0);
  float* out[R];
  const float* w[R];
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) {
    out[r] = t.out + rows[r] * pitch + i0;
    w[r] = t.scratch + rows[r] * kDecodeKeyBlock;
  }
  VF acc[R][V];
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) TENFOLD_UNROLL for (int x = 0; x < V; ++x) acc[r][x] =
      load(out[r] + x * kWidth);
  for (int64_t j = from; j < to; ++j) {
    const T* row = reinterpret_cast<const T*>(b.v[j]) + offset + i0;
    if constexpr (kFetch)
      TENFOLD_UNROLL for (int x = 0; x < V; ++x) fetch<T>(ahead.row(j), i0 + x * kWidth);
    VF value[V];
    if constexpr (V == 1) {
      value[0] = kPart ? load_n(row, last) : load(row);
    } else {
      TENFOLD_UNROLL for (int x = 0; x < V; x += 2)
          load_two(row + x * kWidth, &value[x], &value[x + 1]);
    }
    TENFOLD_UNROLL for (int r = 0; r < R; ++r) {
      const VF weight = set1(w[r][j]);
      TENFOLD_UNROLL for (int x = 0; x < V; ++x) acc[r][x] = fma(weight, value[x], acc[r][x]);
    }
  }
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) TENFOLD_UNROLL for (int x = 0; x < V; ++x)
      store(out[r] + x * kWidth, acc[r][x]);
}

#if defined(TENFOLD_ISA_BF16)
inline uint16_t* bf16_weights(const DecodeTask& t) {
  return reinterpret_cast<uint16_t*>(t.scratch +
                                     t.rows * (kDecodeKeyBlock + decode_pitch(t.head_dim)));
}

void round_weights(const DecodeTask& t, int64_t r, int64_t n) {
  const float* from = t.scratch + r * kDecodeKeyBlock;
  auto* to = reinterpret_cast<bf16_t*>(bf16_weights(t) + r * kDecodeKeyBlock);
  for (int64_t j = 0; j < n; j += kWidth) store(to + j, load(from + j));
}

// Two tokens at a time: their values side by side, and their weights rounded to bf16 as
// everywhere where such weights are multiplied in bf16. Half the multiplications, no conversion.
template <class T, int R, int V, bool kPart, bool kFetch>
  requires(__is_same(T, bf16_t) && V > 1)
void values_tile(const DecodeTask& t, const Block& b, int64_t offset, const int32_t* rows,
                 int64_t i0, int64_t from, int64_t to, const Ahead& ahead) {
  const int64_t pitch = decode_pitch(t.value_dim);
  float* out[R];
  const uint16_t* w[R];
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) {
    out[r] = t.out + rows[r] * pitch + i0;
    w[r] = bf16_weights(t) + rows[r] * kDecodeKeyBlock;
  }
  VF acc[R][V];
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) TENFOLD_UNROLL for (int x = 0; x < V; ++x) acc[r][x] =
      load(out[r] + x * kWidth);
  for (int64_t j = from; j < to; j += 2) {
    const bool alone = j + 1 == to;  // beside it zeros: the next token is not everybody's
    const T* one = reinterpret_cast<const T*>(b.v[j]) + offset + i0;
    const T* two = reinterpret_cast<const T*>(b.v[alone ? j : j + 1]) + offset + i0;
    const __mmask16 there = alone ? 0 : 0xFFFF;
    if constexpr (kFetch) {
      TENFOLD_UNROLL for (int x = 0; x < V; ++x) {
        fetch<T>(ahead.row(j), i0 + x * kWidth);
        fetch<T>(ahead.row(alone ? j : j + 1), i0 + x * kWidth);
      }
    }
    VI value[V];
    TENFOLD_UNROLL for (int x = 0; x < V; x += 2) {
      const __m512i first = _mm512_loadu_si512(one + x * kWidth);
      const __m512i second = _mm512_maskz_loadu_epi32(there, two + x * kWidth);
      value[x] = {_mm512_unpacklo_epi16(first, second)};
      value[x + 1] = {_mm512_unpackhi_epi16(first, second)};
    }
    TENFOLD_UNROLL for (int r = 0; r < R; ++r) {
      int32_t pair = w[r][j];
      if (!alone) __builtin_memcpy(&pair, w[r] + j, sizeof(pair));
      const VI weight = {_mm512_set1_epi32(pair)};
      TENFOLD_UNROLL for (int x = 0; x < V; ++x) acc[r][x] = dot_bf16(acc[r][x], weight, value[x]);
    }
  }
  TENFOLD_UNROLL for (int r = 0; r < R; ++r) TENFOLD_UNROLL for (int x = 0; x < V; ++x)
      store(out[r] + x * kWidth, acc[r][x]);
}
#endif

// Vectors of a tile of so many rows: as many accumulators as registers are there for.
constexpr int vectors(int rows) {
  return kWidth <= 8 ? 2 : rows <= 2 ? 8 : 4;
}

template <class T, int R, bool kFetch>
void values_of_rows(const DecodeTask& t, const Block& b, int64_t offset, const int32_t* rows,
                    int64_t from, int64_t to, const Ahead& ahead) {
  constexpr int V = vectors(R);
  int64_t i = 0;
  for (; i + V * kWidth <= t.value_dim; i += V * kWidth)
    values_tile<T, R, V, false, kFetch>(t, b, offset, rows, i, from, to, ahead);
  for (; i + 2 * kWidth <= t.value_dim; i += 2 * kWidth)
    values_tile<T, R, 2, false, kFetch>(t, b, offset, rows, i, from, to, ahead);
  for (; i + kWidth <= t.value_dim; i += kWidth)
    values_tile<T, R, 1, false, kFetch>(t, b, offset, rows, i, from, to, ahead);
  if (i < t.value_dim) values_tile<T, R, 1, true, kFetch>(t, b, offset, rows, i, from, to, ahead);
}

// The same for one token that not every row sees: whatever it holds must not reach the others.
template <class T>
void value_of_some(const DecodeTask& t, const Block& b, const DecodeHead& head, int64_t j) {
  const T* v = reinterpret_cast<const T*>(b.v[j]) + head.offset;
  for (int64_t n = 0; n < head.num_rows; ++n) {
    const int64_t r = t.value_rows[head.first_row + n], token = b.first + j;
    if (token < t.begin[r] || token >= t.end[r]) continue;
    const VF weight = set1(t.scratch[r * kDecodeKeyBlock + j]);
    float* out = t.out + r * decode_pitch(t.value_dim);
    int64_t i = 0;
    for (; i + 2 * kWidth <= t.value_dim; i += 2 * kWidth) {
      VF x, y;
      load_two(v + i, &x, &y);
      store(out + i, fma(weight, x, load(out + i)));
      store(out + i + kWidth, fma(weight, y, load(out + i + kWidth)));
    }
    for (; i < t.value_dim; i += kWidth) {
      const int left = static_cast<int>(t.value_dim - i < kWidth ? t.value_dim - i : kWidth);
      store_n(out + i, fma(weight, load_n(v + i, left), load_n(out + i, left)), left);
    }
  }
}

template <class T, bool kFetch>
inline void values_of_next_rows(const DecodeTask& t, const Block& b, int64_t offset,
                                const int32_t* rows, const int32_t* end, int64_t from, int64_t to,
                                const Ahead& ahead) {
  if constexpr (kValueRows == 4) {
    if (end - rows >= 4) return values_of_rows<T, 4, kFetch>(t, b, offset, rows, from, to, ahead);
    if (end - rows == 3) return values_of_rows<T, 3, kFetch>(t, b, offset, rows, from, to, ahead);
  }
  if (end - rows >= 2) return values_of_rows<T, 2, kFetch>(t, b, offset, rows, from, to, ahead);
  values_of_rows<T, 1, kFetch>(t, b, offset, rows, from, to, ahead);
}

inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Tokens [from, to) of the block are seen by all rows.
template <class T>
void values_of_head(const DecodeTask& t, const Block& b, const DecodeHead& head, int64_t from,
                    int64_t to, const Ahead& ahead) {
  const int32_t* rows = t.value_rows + head.first_row;
  const int32_t* end = rows + head.num_rows;
  for (int64_t j = from; j < to; j += kValueTokens) {
    const int64_t stop = clamp(j + kValueTokens, j, to);
    values_of_next_rows<T, true>(t, b, head.offset, rows, end, j, stop, ahead);
    for (const int32_t* more = rows + kValueRows; more < end; more += kValueRows)
      values_of_next_rows<T, false>(t, b, head.offset, more, end, j, stop, ahead);
  }
  for (int64_t j = 0; j < b.num_keys; ++j)
    if (j < from || j >= to) value_of_some<T>(t, b, head, j);
}

// One block; `next` is the one after it, maybe empty.
template <class T>
void run_block(const DecodeTask& t, const Block& b, const Block& next, int64_t all_from,
               int64_t all_to) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t n = b.num_keys;
  for (int64_t h = 0; h < t.num_key_heads; ++h) {
    const bool last = h + 1 == t.num_key_heads;
    const Ahead ahead{last ? b.v : b.k,
                      (last ? t.value_heads[0].offset : t.key_heads[h + 1].offset) * kSize};
    logits_of_head<T>(t, b, t.key_heads[h], ahead);
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    softmax_row(t, b, r, clamp(t.begin[r] - b.first, 0, n), clamp(t.end[r] - b.first, 0, n));
#if defined(TENFOLD_ISA_BF16)
    if (__is_same(T, bf16_t)) round_weights(t, r, n);
#endif
  }
  const int64_t from = clamp(all_from - b.first, 0, n), to = clamp(all_to - b.first, from, n);
  for (int64_t h = 0; h < t.num_value_heads; ++h) {
    const bool last = h + 1 == t.num_value_heads;
    const Ahead ahead{last ? (next.num_keys > 0 ? next.k : b.k) : b.v,
                      (last ? t.key_heads[0].offset : t.value_heads[h + 1].offset) * kSize};
    values_of_head<T>(t, b, t.value_heads[h], from, to, ahead);
  }
}

template <class T>
void run(const DecodeTask& t) {
  if (t.rows == 0) return;
  const int64_t width = decode_pitch(t.value_dim);
  for (int64_t r = 0; r < t.rows; ++r) t.max[r] = kDecodeNothing, t.sum[r] = 0.0f;
  for (int64_t i = 0; i < t.rows * width; ++i) t.out[i] = 0.0f;
  int64_t all_from = 0, all_to = t.num_keys;  // seen by all rows
  for (int64_t r = 0; r < t.rows; ++r) {
    all_from = t.begin[r] > all_from ? t.begin[r] : all_from;
    all_to = t.end[r] < all_to ? t.end[r] : all_to;
  }
#if defined(TENFOLD_ISA_BF16)
  if (__is_same(T, bf16_t)) round_queries(t);
#endif
  Cursor cursor{0, 0, 0};
  Block blocks[2];
  next_block(t, sizeof(T), all_from, all_to, &cursor, &blocks[0]);
  for (int now = 0; blocks[now].num_keys > 0; now ^= 1) {
    next_block(t, sizeof(T), all_from, all_to, &cursor, &blocks[now ^ 1]);
    run_block<T>(t, blocks[now], blocks[now ^ 1], all_from, all_to);
  }
  restore_order<T>(t);
}

}  // namespace

void decode_task(const DecodeTask& t) {
  if (t.dtype == Dtype::f32) return run<float>(t);
  if (t.dtype == Dtype::bf16) return run<bf16_t>(t);
  run<fp16_t>(t);
}

TENFOLD_ISA_END
