// SPDX-License-Identifier: Apache-2.0
// What follows the products of experts: the activation, and its gradient. Positions are rows of
// sorted slots.
#pragma once

#include "moe/cuda/grouped_product.cuh"

namespace tenfold::cuda {

// Float rows that are added to sums: of tokens, row token[position]. Null: none.
struct TokenRows {
  const float* data;
  int64_t stride;
  const int* token;

  __device__ const float* row(int64_t position) const {
    return data != nullptr ? data + token[position] * stride : nullptr;
  }
};

// 1 / (1 + e^-x), from the exponential that cannot overflow.
template <class T>
__device__ inline float sigmoid(float x) {
  using Units = SoftmaxUnits<T>;
  const float e = Units::exp(-fabsf(x) * Units::kPerNatural);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// One or two neighbours of a row.
template <class T>
__device__ inline void get_two(const T* from, float (&x)[2], bool both, bool at_once) {
  if (both && at_once) {
    T two[2];
    if constexpr (sizeof(T) == 2) {
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(from);
      memcpy(two, &bits, sizeof(bits));
    } else {
      const uint64_t bits = *reinterpret_cast<const uint64_t*>(from);
      memcpy(two, &bits, sizeof(bits));
    }
    x[0] = to_float(two[0]), x[1] = to_float(two[1]);
    return;
  }
  x[0] = to_float(from[0]), x[1] = both ? to_float(from[1]) : 0.0f;
}

// Of a product of pairs: a = factor silu(g) u, g = gate + base, u = up + base. g and u are kept
// unless hidden is null.
template <class T>
struct StoreSwiglu {
  TokenRows base;
  int64_t base_up;  // columns from gate's to up's
  const float* factor;
  T *a, *hidden;
  int64_t ffn;  // between rows of a, and from g to u
  bool twos;

  template <class P>
  __device__ void store(const RowTile& rows, int64_t col, int64_t cols,
                        const typename P::Sums& sums) const {
    const int64_t col0 = col + P::warp_col() / 2 + P::first_col() % 8;
    for_rows<P>(sums, [&](int r, const float (&products)[P::kN][2]) {
      if (r >= rows.rows) return;
      const int64_t position = rows.first + r;
      const float* const token = base.row(position);
      const float by = factor != nullptr ? factor[position] : 1.0f;
#pragma unroll
      for (int n = 0; n < P::kN; n += 2) {
        const int64_t c = col0 + 4 * n;
        if (c >= cols) break;
        const bool both = c + 1 < cols;
        float g[2], u[2], y[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          g[i] = products[n][i], u[i] = products[n + 1][i];
          if (token != nullptr && (i == 0 || both))
            g[i] += token[c + i], u[i] += token[base_up + c + i];
          y[i] = g[i] * sigmoid<T>(g[i]) * u[i] * by;
        }
        put_two(a + position * ffn + c, y, both, twos);
        if (hidden == nullptr) continue;
        put_two(hidden + position * 2 * ffn + c, g, both, twos);
        put_two(hidden + position * 2 * ffn + ffn + c, u, both, twos);
      }
    });
  }
};

constexpr int kDotCols = 64;  // of a warp, in every shape of tile

// From y = the gradient of a before its factor w (sums + base), and g, u:
//   dg = w y u s (1 + g (1 - s)), du = w y silu(g), wa = w a;  s = sigmoid(g)
//   dots [columns / kDotCols][rows of dots] of <y, a>
template <class T>
struct StoreSwigluBackward {
  TokenRows base;
  const float* factor;
  const T* hidden;
  T *both, *wa;  // as hidden; as a
  int64_t ffn;
  bool twos;
  float* dots;
  int64_t dot_rows;

  template <class P>
  __device__ void store(const RowTile& rows, int64_t col, int64_t cols,
                        const typename P::Sums& sums) const {
    static_assert(8 * P::kN == kDotCols);
    const int64_t group = col + P::warp_col(), col0 = col + P::first_col();
    for_rows<P>(sums, [&](int r, const float (&products)[P::kN][2]) {
      const int64_t position = rows.first + r;
      float dot = r < rows.rows ? columns<P>(position, col0, cols, products) : 0.0f;
      dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 1);  // four lanes have a row
      dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 2);
      if (r < rows.rows && group < cols && threadIdx.x % 4 == 0)
        dots[group / kDotCols * dot_rows + position] = dot;
    });
  }

  template <class P>
  __device__ __forceinline__ float columns(int64_t position, int64_t col0, int64_t cols,
                                           const float (&products)[P::kN][2]) const {
    const float* const token = base.row(position);
    const float w = factor[position];
    float dot = 0.0f;
#pragma unroll
    for (int n = 0; n < P::kN; ++n) {
      const int64_t c = col0 + 8 * n, at = position * 2 * ffn + c;
      if (c >= cols) break;
      const bool two = c + 1 < cols;
      float g[2], u[2], a[2], dg[2], du[2];
      get_two(hidden + at, g, two, twos);
      get_two(hidden + at + ffn, u, two, twos);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float y = products[n][i];
        const bool inside = i == 0 || two;
        if (token != nullptr && inside) y += token[c + i];
        const float s = sigmoid<T>(g[i]), silu = g[i] * s;
        a[i] = silu * u[i];
        if (inside) dot += y * a[i];
        y *= w;
        dg[i] = y * u[i] * (s * fmaf(g[i], 1.0f - s, 1.0f)), du[i] = y * silu;
        a[i] *= w;
      }
      put_two(both + at, dg, two, twos);
      put_two(both + at + ffn, du, two, twos);
      put_two(wa + position * ffn + c, a, two, twos);
    }
    return dot;
  }
};

}  // namespace tenfold::cuda
