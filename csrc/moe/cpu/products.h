// SPDX-License-Identifier: Apache-2.0
// Tiles of products with grouped rows (an expert's slots), for grouped.cpp, made of the panels of
// core/cpu/packed.h. A tile is what one task computes of
//   sums [rows, cols] = a [rows, depth] * w^T,  w [cols, depth] (by_rows), or * w [depth, cols]
// where the rows of a may be gathered, or of a weight gradient
//   out [rows, cols] = dy[:, rows]^T * a[:, cols]   over the slots of an expert.
// Operands are packed a strip of the depth at a time, which with the tile's sums fits the second
// cache. Few rows times a matrix by rows are dot products, for which nothing is packed: a weight is
// read once.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kMoeRows = 256, kMoeCols = 384;  // most of a tile; 48 | kMoeCols
constexpr int64_t kMoeRowUnit = 16;                // a multiple of every ISA's rows of a panel
constexpr int64_t kMoeColUnit = 48;                // and lanes of a tile
constexpr int64_t kMoeStrip = 128;                 // words of the depth that are packed at a time
// Sums lie an odd number of cache lines apart, like packed panels: a power of two would put what is
// written together into one cache set.
constexpr int64_t kMoePad = 16, kMoePitch = kMoeCols + kMoePad;
// So few rows are multiplied without packing, if they fit the second cache as floats.
constexpr int64_t kMoeFewest = 8, kMoeFewRows = 32, kMoeFewFloats = int64_t{1} << 17;

// Row i: `stride` elements times gather[i], or times i.
struct MoeRows {
  const void* data;
  int64_t stride;
  const int32_t* gather = nullptr;
  bool operator==(const MoeRows&) const = default;
};

struct MoeProduct {
  Dtype dtype;
  MoeRows a;
  int64_t first, rows;  // of a
  const void* w;        // the tile's first column
  int64_t w_stride;     // elements between rows
  bool by_rows;
  int64_t cols, depth;
  bool add;     // to what the sums hold
  bool again;   // rows of a as in the call before, with the same room
  float* sums;  // [rows rounded up to 16][kMoePitch]
  float* room;  // moe_product_room()
};

struct MoeWgrad {
  Dtype dtype;
  MoeRows dy, a;
  int64_t first, slots;
  int64_t row, rows, col, cols;
  void* out;  // the tile's first element
  int64_t out_stride;
  bool past_caches;
  float *sums, *room;
};

// A panel of 8 and a tile of up to 48 lanes of a strip; 8 staged rows of it, as floats.
constexpr int64_t kMoePanel = 8 * kMoeStrip + kMoePad;
constexpr int64_t kMoeStaged = 8 * 2 * kMoeStrip;
constexpr int64_t kMoeSums = kMoeRows * kMoePitch;
constexpr int64_t kMoeRoom =  // tiles are 12 lanes wide at least
    kMoeRows / 8 * kMoePanel + kMoeCols * kMoeStrip + kMoeCols / 12 * kMoePad + kMoeStaged;

constexpr bool moe_few_rows(int64_t rows, int64_t depth) {
  return rows <= kMoeFewest || (rows <= kMoeFewRows && rows * depth <= kMoeFewFloats);
}

// By AMX a matrix by rows is not packed; of the rows of a as many words of their depth at a time as
// fit the second cache.
constexpr bool moe_by_tiles(Isa isa, Dtype dtype) {
  return isa == Isa::avx512_amx && dtype == Dtype::bf16;
}
constexpr int64_t moe_turned_words(int64_t depth) {
  return depth > 2048 ? 1024 : (depth + 31) / 32 * 16;
}

// Floats of room for a product.
constexpr int64_t moe_product_room(Isa isa, Dtype dtype, int64_t depth) {
  const int64_t few = kMoeFewFloats + kMoeFewRows * 16, long_rows = 8 * (depth + 16);
  const int64_t rows = few > long_rows ? few : long_rows;
  const int64_t packed = kMoeRoom > rows ? kMoeRoom : rows, words = moe_turned_words(depth);
  const int64_t turned =
      (kMoeRows + kMoeColUnit) * (words + kMoePad) + kMoeCols * (kMoeRows + kMoePad) + 32 * words;
  return moe_by_tiles(isa, dtype) && turned > packed ? turned : packed;
}

TENFOLD_ISA_DECLARE_AMX(void moe_product(const MoeProduct& p))
TENFOLD_ISA_DECLARE_AMX(void moe_wgrad(const MoeWgrad& p))

}  // namespace tenfold
