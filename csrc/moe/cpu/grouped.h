// SPDX-License-Identifier: Apache-2.0
// Products over groups of rows (the slots of an expert, sorted), tile by tile over the threads. No
// element of a result depends on how the work is shared out.
#pragma once

#include <functional>
#include <vector>

#include "core/floats.h"
#include "moe/cpu/expert_rows.h"
#include "moe/sort.h"

namespace tenfold::cpu {

// Rows [offsets[i], offsets[i + 1]) are those of group i.
struct Groups {
  const int64_t* offsets;
  int64_t count;
  int64_t rows() const { return offsets[count]; }
  int64_t length(int64_t i) const { return offsets[i + 1] - offsets[i]; }
};

// [groups, cols, depth] (by rows) or [groups, depth, cols]; strides in elements.
struct Matrices {
  const void* data;
  int64_t group_stride, stride;
  bool by_rows;
};

// One product, or two: of equal shape side by side, or (`together`) added up.
struct GroupedProduct {
  Dtype dtype;
  int64_t depth, cols;  // of each
  int64_t parts;
  MoeRows a[2];
  Matrices w[2];
  bool together = false;
};

// What a task has computed: columns [col, col + cols) of each product.
struct ProductTile {
  MoeTileRows rows;
  int64_t group, col, block;  // block: which of product_blocks()
  const float* sums[2];
};
using Finish = std::function<void(const ProductTile&)>;

// Blocks of `cols` columns, by the shapes alone. `first`, `cols`: a range of the columns only.
int64_t product_blocks(const GroupedProduct& p, const Groups& g, int64_t cols);
void grouped_product(Isa isa, const GroupedProduct& p, const Groups& g, const Finish& finish);
void grouped_product(Isa isa, const GroupedProduct& p, const Groups& g, int64_t first, int64_t cols,
                     const Finish& finish);

// Rows stored as they are, as dtype, times scale; part i from column i `cols` on.
Finish store_as(Isa isa, Dtype dtype, const GroupedProduct& p, float scale, void* out,
                int64_t stride);

// out [groups, dy_cols, a_cols] of dtype; a group without rows gives zeros.
void grouped_wgrad(Isa isa, Dtype dtype, const MoeRows& dy, int64_t dy_cols, const MoeRows& a,
                   int64_t a_cols, const Groups& g, void* out);

// Of `cols` columns as many at a time as wait in the last cache, as floats of so many rows.
int64_t round_cols(int64_t rows, int64_t cols);

// out[token] = base product's row + sum over its slots of factor[position] * product's row.
// `base`: of tokens, one group; or null. factor: null for 1. out: rows of p.cols.
void product_to_tokens(Isa isa, const GroupedProduct& p, const SortedSlots& slots, int64_t tokens,
                       int64_t k, const float* factor, const GroupedProduct* base, void* out);

// out[token] = sum over its slots of rows of in, both of dtype.
void slots_to_tokens(Isa isa, Dtype dtype, const SortedSlots& slots, int64_t tokens, int64_t k,
                     const void* in, int64_t cols, void* out);

}  // namespace tenfold::cpu
