// SPDX-License-Identifier: Apache-2.0
// Blocks of the Gram matrix of head_cka in bf16 by AMX tiles. All of w is packed once as panels of
// left operands: rows of w lie a power of two apart, which few sets of a cache hold and no
// prefetcher follows. A step multiplies kStep columns: of block b they become lanes, blocks a
// follow as they lie, and the products accumulate in a float32 block each.
#include "attention/head_cka.h"
#include "core/cpu/amx_panels.h"

#if defined(TENFOLD_ISA_AMX)
TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kStep = kAmxStrip;  // words: a tile of lanes stays in the first cache
constexpr int64_t kTiles = (kGramRows + kTileRows - 1) / kTileRows, kPitch = kTiles * kTileRows;
constexpr int64_t kLaneStride = kStep * kTileRows, kSums = kGramRows * kPitch;
static_assert(kGramRows % kAmxBlock == 0 && kStep % kAmxWords == 0);

// A tile more than there is, lest panels lie a power of two apart.
int64_t panel_stride(const GramProblem& p) {
  return amx_words(p.length) * kAmxRows + kAmxTile;
}
int64_t block_stride(const GramProblem& p) {
  return round_up(rows_of(p, 0), kAmxRows) / kAmxRows * panel_stride(p);
}

// In double, row by row: rows are short enough for float32 sums. Past the columns are zeros.
double square_sum(const float* sums, int64_t rows) {
  double total = 0.0;
  for (int64_t r = 0; r < rows; ++r, sums += kPitch) {
    VF sum = set1(0.0f);
    for (int64_t c = 0; c < kPitch; c += kWidth) sum = fma(load(sums + c), load(sums + c), sum);
    total += hsum(sum);
  }
  return total;
}

}  // namespace

int64_t gram_tiles_packed(const GramProblem& p, int64_t heads) {
  return heads * p.blocks * block_stride(p);
}

void gram_tiles_pack(const GramProblem& p, int64_t block, float* packed) {
  const int64_t first = block % p.blocks * kGramRows, count = rows_of(p, block);
  const auto* const from =
      static_cast<const bf16_t*>(p.w) + block / p.blocks * p.head_stride + first * p.row_stride;
  float* to = packed + block * block_stride(p);
  for (int64_t r = 0; r < count; r += kAmxRows, to += panel_stride(p)) {
    const bf16_t* row[kAmxRows];
    for (int64_t i = 0; i < kAmxRows; ++i)
      row[i] = r + i < count ? from + (r + i) * p.row_stride : nullptr;
    pack_panel16(row, p.length, to);
  }
}

int64_t gram_tiles_scratch() {
  return kTiles * kLaneStride + kGramRun * kSums;
}

void gram_tiles_run(const GramProblem& p, const float* packed, const GramRun& run) {
  float *const lanes = run.scratch, *const sums = lanes + kTiles * kLaneStride;
  const int64_t block = block_stride(p), panel = panel_stride(p), words = amx_words(p.length);
  const int64_t cols = rows_of(p, run.b);
  for (int64_t i = 0; i < run.num_a * kSums; i += kWidth) store(sums + i, set1(0.0f));
  const AmxTiles registers;
  const auto nothing = [] {};
  for (int64_t x = 0; x < words; x += kStep) {
    const int64_t depth = words - x < kStep ? words - x : kStep;
    for (int64_t c = 0; c < cols; c += kAmxRows) {
      const float* const from = packed + run.b * block + c / kAmxRows * panel + x * kAmxRows;
      float* const to = lanes + c / kTileRows * kLaneStride + c % kTileRows;
      for (int64_t d = 0; d < depth; d += kAmxWords)
        transpose16([&](int i) { return from + d * kAmxRows + i * kAmxWords; }, to + d * kTileRows,
                    kTileRows);
    }
    for (int64_t i = 0; i < run.num_a; ++i)
      multiply_block(left_panels(packed + (run.a + i) * block + x * kAmxRows, panel),
                     rows_of(p, run.a + i), lanes, kLaneStride, cols, depth, kStep,
                     sums + i * kSums, kPitch, true, nothing);
  }
  for (int64_t i = 0; i < run.num_a; ++i)
    run.squares[i] = square_sum(sums + i * kSums, rows_of(p, run.a + i));
}

TENFOLD_ISA_END
#endif
