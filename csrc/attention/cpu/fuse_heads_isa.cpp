// SPDX-License-Identifier: Apache-2.0
// Row mixing and row products of fuse_heads: outputs of a block of columns stay in registers.
#include "attention/fuse_heads.h"
#include "core/cpu/vec.h"

TENFOLD_ISA_BEGIN
namespace {

// Outputs formed at once (more take several passes over a strip), and accumulators that fit.
// Without wide vectors nothing goes past the caches.
#if defined(TENFOLD_ISA_AVX512)
constexpr int kAccumulators = 24, kDotRows = 4, kDotColumns = 4, kDirectHeads = 4;
#else
constexpr int kAccumulators = 12, kDotRows = 2, kDotColumns = 4, kDirectHeads = 2;
#endif
#if defined(TENFOLD_ISA_AVX512) || defined(TENFOLD_ISA_AVX2)
constexpr int kMaxOutputs = 8, kStripOutputs = 6;
constexpr bool kStreams = true;
#else
constexpr int kMaxOutputs = 4, kStripOutputs = 4;
constexpr bool kStreams = false;
#endif

constexpr int vectors_of(int outputs) {
  return kAccumulators / outputs < 1   ? 1
         : kAccumulators / outputs > 4 ? 4
                                       : kAccumulators / outputs;
}

inline int lanes(int64_t left) {
  return static_cast<int>(left < kWidth ? left : kWidth);
}

// Where inputs are read: rows of the tensor, or their float32 copy.
template <class T>
struct TensorRows {
  const void* const* rows;
  int64_t x;
  inline const T* operator[](int64_t i) const { return static_cast<const T*>(rows[i]) + x; }
};
struct Strip {
  const float* data;
  inline const float* operator[](int64_t i) const { return data + i * kFuseStrip; }
};

// Where outputs go: rows of the tensor (kStream: past the caches), or a strip that is copied out
// later: a vector of 16-bit values is half a line, and only whole lines leave well past the caches.
template <class T, bool kStreamed>
struct OutputRows {
  static constexpr bool kStream = kStreamed;
  void* const* rows;
  int64_t x;
  inline T* operator[](int64_t o) const { return static_cast<T*>(rows[o]) + x; }
};
template <class T>
struct OutputStrip {
  static constexpr bool kStream = false;
  T* data;
  inline T* operator[](int64_t o) const { return data + o * kFuseStrip; }
};

template <bool kStream, class T>
inline void put(T* at, VF x) {
  if constexpr (kStream) {
    stream(at, x);
  } else {
    store(at, x);
  }
}

// Columns [x, x + V * kWidth) of outputs [first, first + kOut); with kTail `tail` lanes of one
// vector.
template <class Out, class In, int kOut, int V, bool kTail>
inline void mix_tile(const MixRows& p, const In& from, const Out& to, int64_t first, int64_t x,
                     int tail) {
  VF sum[kOut][V];
#pragma GCC unroll 8
  for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[o][v] = set1(0.0f);
  const float* coef = p.coef + first;
  for (int64_t i = 0; i < p.num_in; ++i, coef += p.coef_in) {
    VF in[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      in[v] = kTail ? load_n(from[i] + x, tail) : load(from[i] + x + v * kWidth);
#pragma GCC unroll 8
    for (int o = 0; o < kOut; ++o) {
      const VF by = set1(coef[o]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[o][v] = fma(by, in[v], sum[o][v]);
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      auto* at = to[first + o] + x + v * kWidth;
      if constexpr (kTail) {
        store_n(at, sum[o][v], tail);
      } else {
        put<Out::kStream>(at, sum[o][v]);
      }
    }
}

template <class Out, class In, int kOut>
void mix_block(const MixRows& p, const In& from, const Out& to, int64_t first, int64_t length) {
  constexpr int V = vectors_of(kOut);
  int64_t x = 0;
  for (; x + V * kWidth <= length; x += V * kWidth)
    mix_tile<Out, In, kOut, V, false>(p, from, to, first, x, 0);
  for (; x + kWidth <= length; x += kWidth)
    mix_tile<Out, In, kOut, 1, false>(p, from, to, first, x, 0);
  if (x < length) mix_tile<Out, In, kOut, 1, true>(p, from, to, first, x, lanes(length - x));
}

// The same of n outputs, at most kMost.
template <class Out, class In, int kMost = kMaxOutputs>
inline void mix_some(const MixRows& p, const In& from, const Out& to, int64_t first, int64_t n,
                     int64_t length) {
  if constexpr (kMost > 1)
    if (n < kMost) return mix_some<Out, In, kMost - 1>(p, from, to, first, n, length);
  mix_block<Out, In, kMost>(p, from, to, first, length);
}

template <class Out, class In>
void mix_blocks(const MixRows& p, const In& from, const Out& to, int64_t length) {
  const int64_t most = p.num_out <= kMaxOutputs ? kMaxOutputs : kStripOutputs;
  const int64_t blocks = (p.num_out + most - 1) / most;
  for (int64_t b = 0, o = 0; b < blocks; ++b) {
    const int64_t n = (p.num_out - o) / (blocks - b);  // blocks of nearly equal size
    mix_some(p, from, to, o, n, length);
    o += n;
  }
}

// A strip of 16-bit outputs to its rows, past the caches. `length` is a whole number of lines.
template <class T>
void stream_strip(const T* strip, void* const* rows, int64_t num_rows, int64_t x, int64_t length) {
  constexpr int64_t kStep = kWidth * 4 / static_cast<int64_t>(sizeof(T));
  for (int64_t o = 0; o < num_rows; ++o, strip += kFuseStrip) {
    T* to = static_cast<T*>(rows[o]) + x;
    for (int64_t c = 0; c < length; c += kStep)
      stream(reinterpret_cast<float*>(to + c), load(reinterpret_cast<const float*>(strip + c)));
  }
}

// All outputs of the strip of columns [x, x + length); `from` starts at column x.
template <class T, bool kStream, class In>
void mix_outputs(const MixRows& p, const In& from, int64_t x, int64_t length, float* staged) {
  if constexpr (kStream && sizeof(T) == 2) {
    T* strip = reinterpret_cast<T*>(staged);
    mix_blocks(p, from, OutputStrip<T>{strip}, length);
    stream_strip(strip, p.to, p.num_out, x, length);
  } else {
    mix_blocks(p, from, OutputRows<T, kStream>{p.to, x}, length);
  }
}

// Columns [x, x + length) of rows as float32, zeros up to a whole vector.
template <class T>
void fill_strip(const void* const* rows, int64_t num_rows, int64_t x, int64_t length,
                float* strip) {
  for (int64_t i = 0; i < num_rows; ++i, strip += kFuseStrip) {
    const T* from = static_cast<const T*>(rows[i]) + x;
    int64_t c = 0;
    for (; c + kWidth <= length; c += kWidth) store(strip + c, load(from + c));
    if (c < length) store(strip + c, load_n(from + c, lanes(length - c)));
  }
}

inline int64_t strip_length(int64_t x, int64_t length) {
  return length - x < kFuseStrip ? length - x : kFuseStrip;
}

template <class T, bool kStream>
void mix(const MixRows& p) {
  float* staged = p.scratch + (p.num_out <= kMaxOutputs ? 0 : p.num_in * kFuseStrip);
  for (int64_t x = 0; x < p.length; x += kFuseStrip) {
    const int64_t n = strip_length(x, p.length);
    if (p.num_out <= kMaxOutputs) {  // every input is read once
      mix_outputs<T, kStream>(p, TensorRows<T>{p.from, x}, x, n, staged);
    } else {
      fill_strip<T>(p.from, p.num_in, x, n, p.scratch);
      mix_outputs<T, kStream>(p, Strip{p.scratch}, x, n, staged);
    }
  }
  if constexpr (kStream) stream_fence();
}

// sums[r][c] += lane-wise products of rows a_r and b_c.
template <int R, int C>
inline void dot_tile(const float* a, const float* b, int64_t length, float* sums, int64_t row) {
  VF sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = load(sums + r * row + c * kFuseLanes);
  for (int64_t x = 0; x < length; x += kWidth) {
    VF right[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) right[c] = load(b + c * kFuseStrip + x);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const VF left = load(a + r * kFuseStrip + x);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(sums + r * row + c * kFuseLanes, sum[r][c]);
}

// All pairs of rows of two strips.
void dot_strips(const float* a, const float* b, int64_t heads, int64_t length, float* sums) {
  const int64_t row = heads * kFuseLanes;
  for (int64_t r = 0; r < heads;) {
    const bool tall = r + kDotRows <= heads;
    for (int64_t c = 0; c < heads;) {
      const bool wide = c + kDotColumns <= heads;
      const float *left = a + r * kFuseStrip, *right = b + c * kFuseStrip;
      float* at = sums + r * row + c * kFuseLanes;
      if (tall && wide) dot_tile<kDotRows, kDotColumns>(left, right, length, at, row);
      if (tall && !wide) dot_tile<kDotRows, 1>(left, right, length, at, row);
      if (!tall && wide) dot_tile<1, kDotColumns>(left, right, length, at, row);
      if (!tall && !wide) dot_tile<1, 1>(left, right, length, at, row);
      c += wide ? kDotColumns : 1;
    }
    r += tall ? kDotRows : 1;
  }
}

// One vector of columns of a small group: both gradients from one load of each row.
template <class T, class Out, int G, bool kTail>
inline void direct_step(const FuseBackwardRows& p, int64_t x, const Out& to, int64_t c, int tail,
                        VF (&dots)[G][G]) {
  const auto get = [&](const void* row) {
    const T* at = static_cast<const T*>(row) + x + c;
    return kTail ? load_n(at, tail) : load(at);
  };
  VF grad[G];
#pragma GCC unroll 4
  for (int h = 0; h < G; ++h) grad[h] = get(p.dout[h]);
#pragma GCC unroll 4
  for (int j = 0; j < G; ++j) {
    const VF weight = get(p.w[j]);
    VF sum = set1(0.0f);
#pragma GCC unroll 4
    for (int h = 0; h < G; ++h) {
      dots[h][j] = fma(grad[h], weight, dots[h][j]);
      sum = fma(set1(p.coef[h * G + j]), grad[h], sum);
    }
    if constexpr (kTail) {
      store_n(to[j] + c, sum, tail);
    } else {
      put<Out::kStream>(to[j] + c, sum);
    }
  }
}

// A group of up to kDirectHeads heads: all sums of domega stay in registers, and no row is copied.
template <class T, bool kStream, int G>
void backward_direct(const FuseBackwardRows& p) {
  constexpr bool kStaged = kStream && sizeof(T) == 2;
  VF dots[G][G];
#pragma GCC unroll 4
  for (int h = 0; h < G; ++h)
#pragma GCC unroll 4
    for (int j = 0; j < G; ++j) dots[h][j] = set1(0.0f);
  const auto strip = [&]<class Out>(const Out& to, int64_t x, int64_t n) {
    int64_t c = 0;
    for (; c + kWidth <= n; c += kWidth) direct_step<T, Out, G, false>(p, x, to, c, 0, dots);
    if (c < n) direct_step<T, Out, G, true>(p, x, to, c, lanes(n - c), dots);
  };
  for (int64_t x = 0; x < p.length; x += kFuseStrip) {
    const int64_t n = strip_length(x, p.length);
    if constexpr (kStaged) {
      T* staged = reinterpret_cast<T*>(p.scratch);
      strip(OutputStrip<T>{staged}, x, n);
      stream_strip(staged, p.dw, G, x, n);
    } else {
      strip(OutputRows<T, kStream>{p.dw, x}, x, n);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < G; ++h)
#pragma GCC unroll 4
    for (int j = 0; j < G; ++j) p.dots[h * G + j] = hsum(dots[h][j]);
  if constexpr (kStream) stream_fence();
}

template <class T, bool kStream>
void backward(const FuseBackwardRows& p) {
  if (p.dw && p.dots && p.heads <= kDirectHeads) {
    if (p.heads == 1) return backward_direct<T, kStream, 1>(p);
    if (p.heads == 2) return backward_direct<T, kStream, 2>(p);
    if constexpr (kDirectHeads > 2) {
      if (p.heads == 3) return backward_direct<T, kStream, 3>(p);
      return backward_direct<T, kStream, 4>(p);
    }
  }
  float *grads = p.scratch, *weights = grads + p.heads * kFuseStrip;
  float* staged = weights + p.heads * kFuseStrip;
  float* sums = staged + p.heads * kFuseStrip;
  const int64_t pairs = p.heads * p.heads;
  if (p.dots)
    for (int64_t i = 0; i < pairs; ++i) store(sums + i * kFuseLanes, set1(0.0f));
  const MixRows m{nullptr, p.dw,     p.heads, p.heads,  p.coef,
                  p.heads, p.length, p.dtype, p.stream, grads};
  for (int64_t x = 0; x < p.length; x += kFuseStrip) {
    const int64_t n = strip_length(x, p.length);
    fill_strip<T>(p.dout, p.heads, x, n, grads);
    if (p.dots) {
      fill_strip<T>(p.w, p.heads, x, n, weights);
      dot_strips(grads, weights, p.heads, n, sums);
    }
    if (p.dw) mix_outputs<T, kStream>(m, Strip{grads}, x, n, staged);
  }
  if (p.dots)
    for (int64_t i = 0; i < pairs; ++i) p.dots[i] = hsum(load(sums + i * kFuseLanes));
  if constexpr (kStream) stream_fence();
}

}  // namespace

void mix_rows(const MixRows& p) {
  switch (p.dtype) {
    case Dtype::f32: return p.stream ? mix<float, kStreams>(p) : mix<float, false>(p);
    case Dtype::bf16: return p.stream ? mix<bf16_t, kStreams>(p) : mix<bf16_t, false>(p);
    case Dtype::f16: return p.stream ? mix<fp16_t, kStreams>(p) : mix<fp16_t, false>(p);
  }
}

void fuse_backward_rows(const FuseBackwardRows& p) {
  switch (p.dtype) {
    case Dtype::f32: return p.stream ? backward<float, kStreams>(p) : backward<float, false>(p);
    case Dtype::bf16: return p.stream ? backward<bf16_t, kStreams>(p) : backward<bf16_t, false>(p);
    case Dtype::f16: return p.stream ? backward<fp16_t, kStreams>(p) : backward<fp16_t, false>(p);
  }
}

TENFOLD_ISA_END
