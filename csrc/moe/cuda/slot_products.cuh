// SPDX-License-Identifier: Apache-2.0
// Launches of the kernels of expert blocks.
#pragma once

#include <algorithm>

#include "moe/cuda/experts_launch.h"
#include "moe/cuda/grouped_wgrad.cuh"
#include "moe/cuda/slot_kernels.cuh"
#include "moe/cuda/sort_kernel.cuh"
#include "moe/cuda/swiglu_finish.cuh"

namespace tenfold::cuda {

constexpr int64_t kRoundUnit = 256;  // columns: whole tiles of every shape

// Rows of `cols` elements of T.
template <class T>
bool whole_vectors(const void* data, int64_t stride, int64_t cols) {
  constexpr int64_t kPer = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kPer == 0 && cols % kPer == 0;
}

template <class T>
bool whole_twos(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % (2 * sizeof(T)) == 0 && stride % 2 == 0;
}

template <class T>
ProductRows product_rows(const DeviceRows& r, int64_t cols, const IntArray& gather = {},
                         int64_t limit = 0) {
  return {r.data, r.stride, whole_vectors<T>(r.data, r.stride, cols), gather, limit};
}

// Rows [0, split) of one, then those of the other; `cols` elements each.
template <class T>
ProductMatrices two_matrices(const DeviceMatrices& one, const DeviceMatrices& other, int64_t split,
                             int64_t cols) {
  const auto vectors = [&](const DeviceMatrices& m) {
    return whole_vectors<T>(m.data, m.stride, cols) && m.group_stride * sizeof(T) % 16 == 0;
  };
  return {{one.data, other.data},
          {one.group_stride, other.group_stride},
          {one.stride, other.stride},
          split,
          vectors(one) && vectors(other)};
}

template <class T>
ProductMatrices one_matrix(const DeviceMatrices& m, int64_t cols) {
  return two_matrices<T>(m, m, INT64_MAX, cols);
}

// From a column of the product on.
template <class T>
ProductMatrices columns_from(ProductMatrices m, Lies lies, int64_t first) {
  for (int i = 0; i < 2; ++i)
    m.data[i] = static_cast<const T*>(m.data[i]) + first * (lies == Lies::along ? m.stride[i] : 1);
  return m;
}

template <class T>
StoreRows<T> store_rows(void* out, int64_t stride, bool wide = false, float scale = 1.0f,
                        const float* factor = nullptr) {
  const bool twos = wide ? whole_twos<float>(out, stride) : whole_twos<T>(out, stride);
  return {out, stride, wide, twos, scale, factor};
}

template <class T, Lies kRight, bool kPairs, class Finish>
void launch_product(GroupedArgs<Finish> a, const ExpertLimits& limits, cudaStream_t stream) {
  const int64_t rows = a.groups.rows, groups = a.groups.count + (a.rest ? 1 : 0);
  if (rows == 0 || a.cols == 0 || groups == 0) return;
  const auto launch = [&]<class P>() {
    a.row_tiles =
        static_cast<unsigned>((rows + std::min(groups, rows) * (P::kRows - 1)) / P::kRows);
    a.col_tiles = static_cast<unsigned>(cuts(a.cols, kPairs ? P::kCols / 2 : P::kCols));
    const auto kernel = grouped_product_kernel<P, kRight, kPairs, Finish>;
    TENFOLD_LAUNCH_SHARED(kernel, a.row_tiles * a.col_tiles, P::kThreads, P::kBytes, P::kBytes,
                          stream, a);
  };
  if (rows <= limits.few_rows * groups) {
    launch.template operator()<FewRowsTile<T>>();
  } else {
    launch.template operator()<ProductTile<T>>();
  }
}

// A product whose rows are stored as they are.
struct PlainProduct {
  RowGroups groups;
  ProductRows left;
  ProductMatrices right;
  Lies lies;  // of right
  int64_t depth, cols;
  bool rest = false;
};

template <class T>
void launch_plain(const PlainProduct& p, const StoreRows<T>& to, const ExpertLimits& limits,
                  cudaStream_t stream) {
  const GroupedArgs<StoreRows<T>> a{p.groups, p.left, p.right, p.depth, p.cols,
                                    1,        p.rest, 0,       0,       to};
  if (p.lies == Lies::along) {
    launch_product<T, Lies::along, false>(a, limits, stream);
  } else {
    launch_product<T, Lies::across, false>(a, limits, stream);
  }
}

// out [groups, dy_cols, a_cols]; null: not wanted.
template <class T>
void launch_wgrad(const RowGroups& groups, const ProductRows& dy, int64_t dy_cols,
                  const ProductRows& a, int64_t a_cols, void* out, cudaStream_t stream) {
  using P = ProductTile<T>;
  if (out == nullptr || groups.count * dy_cols * a_cols == 0) return;
  const WgradArgs args{groups,
                       dy,
                       a,
                       dy_cols,
                       a_cols,
                       static_cast<unsigned>(cuts(dy_cols, P::kRows)),
                       static_cast<unsigned>(cuts(a_cols, P::kCols)),
                       out,
                       whole_twos<T>(out, a_cols)};
  const auto blocks = static_cast<unsigned>(groups.count * args.row_tiles * args.col_tiles);
  TENFOLD_LAUNCH_SHARED(grouped_wgrad_kernel<T>, blocks, P::kThreads, P::kBytes, P::kBytes, stream,
                        args);
}

// The sorted slots of a call, and what is done with them.
template <class T>
class SlotProducts {
 public:
  SlotProducts(const RoutedTokens& r, const ExpertLimits& limits, const Room& room,
               cudaStream_t stream)
      : r_(r), limits_(limits), room_(room), stream_(stream) {
    const int64_t s = r.slots();
    const auto ints = [&](int64_t n) { return static_cast<int*>(room(n * 4)); };
    SortArgs a = sort_shape(s, r.experts);
    a.index = r.index;
    int* const order = a.order = ints(s);
    inverse_ = a.inverse = ints(s);
    a.counts = ints(r.experts);
    offsets_ = a.offsets = ints(r.experts + 1);
    a.first = ints(sort_ints(a));
    launch_sort(a, stream);
    token_ = ints(s);
    factor_ = floats(s);
    launch_slot_tokens({order, r.weight, s, r.k, token_, factor_}, stream);
  }

  RowGroups slots() const { return {{offsets_, false, 1}, r_.experts, r_.slots()}; }
  RowGroups tokens() const { return {{}, 1, r_.tokens}; }
  const int* token() const { return token_; }
  const float* factor() const { return factor_; }

  T* elements(int64_t n) const { return static_cast<T*>(room_(n * sizeof(T))); }
  float* floats(int64_t n) const { return static_cast<float*>(room_(n * 4)); }

  // Rows of tokens by position, of tokens, and rows at positions (or of tokens) of scratch.
  ProductRows of_slots(const DeviceRows& rows, int64_t cols) const {
    return product_rows<T>(rows, cols, {token_, false, 1}, r_.tokens);
  }
  ProductRows rows(const void* data, int64_t stride, int64_t cols) const {
    return product_rows<T>({data, stride}, cols);
  }

  void plain(const PlainProduct& p, const StoreRows<T>& to) const {
    launch_plain<T>(p, to, limits_, stream_);
  }
  template <Lies kRight, bool kPairs, class Finish>
  void product(const GroupedArgs<Finish>& a) const {
    launch_product<T, kRight, kPairs>(a, limits_, stream_);
  }
  void wgrad(const RowGroups& groups, const ProductRows& dy, int64_t dy_cols, const ProductRows& a,
             int64_t a_cols, void* out) const {
    launch_wgrad<T>(groups, dy, dy_cols, a, a_cols, out, stream_);
  }

  // Columns at a time of so many float rows.
  int64_t round_width(int64_t rows, int64_t cols) const {
    const int64_t fits = limits_.round_bytes / 4 / std::max<int64_t>(rows, 1);
    return std::min(cols, std::max(fits / kRoundUnit, int64_t{1}) * kRoundUnit);
  }

  // out[token] = base's row + the sum over its slots of factor[position] * the product's row.
  void to_tokens(const PlainProduct& p, const float* factor, const PlainProduct* base,
                 void* out) const {
    const int64_t s = r_.slots(),
                  width = round_width(s + (base != nullptr ? r_.tokens : 0), p.cols);
    float* const in = floats(s * width);
    float* const added = base != nullptr ? floats(r_.tokens * width) : nullptr;
    for (int64_t first = 0; first < p.cols; first += width) {
      const int64_t cols = std::min(width, p.cols - first);
      const auto part = [&](PlainProduct q, float* to, const float* by) {
        q.right = columns_from<T>(q.right, q.lies, first);
        q.cols = cols;
        plain(q, store_rows<T>(to, width, true, 1.0f, by));
      };
      part(p, in, factor);
      if (base != nullptr) part(*base, added, nullptr);
      SumSlotsArgs a{};
      a.inverse = inverse_, a.tokens = r_.tokens, a.k = r_.k, a.cols = cols;
      a.in = in, a.in_stride = width;
      a.base = added, a.base_stride = width;
      a.out = static_cast<T*>(out) + first, a.out_stride = p.cols;
      launch_sum_slots<float, T>(a, stream_);
    }
  }

  // out[token] = the sum over its slots of rows of in.
  void sum_slots(const T* in, int64_t cols, T* out) const {
    SumSlotsArgs a{};
    a.inverse = inverse_, a.tokens = r_.tokens, a.k = r_.k, a.cols = cols;
    a.in = in, a.in_stride = cols;
    a.out = out, a.out_stride = cols;
    launch_sum_slots<T, T>(a, stream_);
  }

  // The gradient of routing weights from parts; `add`: to that of the columns before.
  void add_dots(const float* dots, int64_t parts, bool add, float* out) const {
    if (out != nullptr) launch_slot_dots({inverse_, r_.slots(), parts, dots, add, out}, stream_);
  }

 private:
  const RoutedTokens& r_;
  const ExpertLimits& limits_;
  const Room& room_;
  cudaStream_t stream_;
  int *offsets_, *inverse_, *token_;
  float* factor_;
};

}  // namespace tenfold::cuda
