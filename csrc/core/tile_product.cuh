// SPDX-License-Identifier: Apache-2.0
// Products of matrices, a block per tile of kRows x kCols, over steps of kDepth: stages in shared
// memory, the next steps' copies under way while this one is multiplied. Each operand lies in
// memory either along the depth (a row of the tile holds kDepth) or across it (a row per step of
// depth); ldmatrix brings both to mma.sync. float32 is multiplied by FMAs, exactly.
// An element's sum has the same order in every shape of tile.
#pragma once

#include "core/mma_tile.cuh"

namespace tenfold::cuda {

template <class Element, int kTileRows, int kTileCols, int kDown, int kAcross, int kTileStages>
struct ProductShape {
  using T = Element;
  static constexpr bool kMma = sizeof(T) == 2;
  static constexpr int kWarpsDown = kDown, kWarpsAcross = kAcross;
  static constexpr int kThreads = 32 * kDown * kAcross, kStages = kTileStages;
  static constexpr int kRows = kTileRows, kCols = kTileCols;
  static constexpr int kDepth = 128 / static_cast<int>(sizeof(T));  // ldmatrix reads 128 bytes
  static constexpr int kM = kRows / kWarpsDown / 16, kN = kCols / kWarpsAcross / 8;
  static constexpr int kLeft = kRows * kDepth, kRight = kCols * kDepth;
  static constexpr int kBytes = kStages * (kLeft + kRight) * static_cast<int>(sizeof(T));
  using Sums = float[kM][kN][4];  // in the layout of core/mma_tile.cuh

  // Of the thread's sums [m][n][2 half + i]: row first_row() + 16 m + 8 half, column
  // first_col() + 8 n + i.
  __device__ static int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsAcross * 16 * kM;
  }
  __device__ static int warp_col() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsAcross * 8 * kN;
  }
  __device__ static int first_row() { return warp_row() + static_cast<int>(threadIdx.x) % 32 / 4; }
  __device__ static int first_col() { return warp_col() + static_cast<int>(threadIdx.x) % 4 * 2; }
};

// One block on a multiprocessor: 8 warps of 64 x 64 read half of what 4 x 2 of 32 x 32 would.
template <class T>
using ProductTile = std::conditional_t<sizeof(T) == 2, ProductShape<T, 128, 256, 2, 4, 2>,
                                       ProductShape<T, 128, 128, 4, 2, 2>>;

// Of few rows, which wait for memory: three steps are under way, in each of two blocks.
template <class T>
using FewRowsTile = ProductShape<T, 32, 128, 2, 2, 4>;

// use(row of the tile, its sums [n][i]) for the thread's rows, in a loop: what follows a product is
// long, and written out for each row it would be tens of thousands of instructions that a block
// fetches to run them once. A row's sums are moved to where the loop finds them: registers have no
// index.
template <class P, class Use>
__device__ inline void for_rows(const typename P::Sums& sums, const Use& use) {
#pragma unroll 1
  for (int row = 0; row < 2 * P::kM; ++row) {
    float x[P::kN][2] = {};
#pragma unroll
    for (int r = 0; r < 2 * P::kM; ++r) {
      if (r != row) continue;
#pragma unroll
      for (int n = 0; n < P::kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) x[n][i] = sums[r / 2][n][r % 2 * 2 + i];
    }
    use(P::first_row() + 8 * row, x);
  }
}

// An operand's rows in memory.
enum class Lies { along, across };

template <class P, Lies kLies, int kSide>  // kSide: the tile's kRows or kCols
using OperandTile = Tile<typename P::T, kLies == Lies::along ? P::kDepth : kSide>;

// row_at(r): where row r of the tile starts, or null for zeros; columns from `cols` on are zeros.
// `vectors`: whole, aligned 16-byte vectors. Asynchronous: commit and wait are the caller's.
template <class P, Lies kLies, int kSide, class RowAt>
__device__ inline void load_operand(typename P::T* tile, const typename P::T* aligned, int64_t cols,
                                    bool vectors, const RowAt& row_at) {
  using T = typename P::T;
  using Shape = OperandTile<P, kLies, kSide>;
  constexpr int kWidth = Shape::kVectors * Shape::kPer;
  constexpr int kTileRows = kLies == Lies::along ? kSide : P::kDepth;
  if (vectors) {
    constexpr int kEach = kTileRows * Shape::kVectors / P::kThreads;
    static_assert(kTileRows * Shape::kVectors % P::kThreads == 0);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = static_cast<int>(threadIdx.x) + j * P::kThreads;
      const int r = i / Shape::kVectors, c = i % Shape::kVectors * Shape::kPer;
      const T* const row = row_at(r);
      const bool valid = row != nullptr && c < cols;
      copy16_async(tile + Shape::at(r, c), valid ? row + c : aligned, valid);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileRows * kWidth; i += P::kThreads) {
    const int r = i / kWidth, c = i % kWidth;
    const T* const row = row_at(r);
    T value{};
    if (row != nullptr && c < cols) value = row[c];
    tile[Shape::at(r, c)] = value;
  }
}

template <class P, Lies kLeftLies, Lies kRightLies>
__device__ inline void multiply_mma(const typename P::T* left, const typename P::T* right,
                                    typename P::Sums& sums) {
  using T = typename P::T;
  using Left = OperandTile<P, kLeftLies, P::kRows>;
  using Right = OperandTile<P, kRightLies, P::kCols>;
  const int lane = threadIdx.x % 32, row0 = P::warp_row(), col0 = P::warp_col();
#pragma unroll
  for (int k = 0; k < P::kDepth; k += 16) {
    uint32_t x[P::kM][4];
#pragma unroll
    for (int m = 0; m < P::kM; ++m) {
      const int row = row0 + 16 * m;
      if constexpr (kLeftLies == Lies::along) {
        load_matrices(x[m], left + Left::at(row + lane % 16, k + lane / 16 * 8));
      } else {
        load_matrices_transposed(
            x[m], left + Left::at(k + lane / 16 * 8 + lane % 8, row + lane / 8 % 2 * 8));
      }
    }
#pragma unroll
    for (int n = 0; n < P::kN; n += 2) {
      const int col = col0 + 8 * n;
      uint32_t y[4];
      if constexpr (kRightLies == Lies::along) {
        load_matrices(y, right + Right::at(col + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
      } else {
        load_matrices_transposed(y, right + Right::at(k + lane % 16, col + lane / 16 * 8));
      }
      const uint32_t first[2] = {y[0], y[1]}, second[2] = {y[2], y[3]};
#pragma unroll
      for (int m = 0; m < P::kM; ++m) {
        mma_m16n8k16<T>(sums[m][n], x[m], first);
        mma_m16n8k16<T>(sums[m][n + 1], x[m], second);
      }
    }
  }
}

// Sums of 16 products join the others: shorter chains.
template <class P, Lies kLeftLies, Lies kRightLies>
__device__ inline void multiply_fma(const float* left, const float* right, typename P::Sums& sums) {
  using Left = OperandTile<P, kLeftLies, P::kRows>;
  using Right = OperandTile<P, kRightLies, P::kCols>;
  const int row0 = P::first_row(), col0 = P::first_col();
#pragma unroll 1
  for (int step = 0; step < P::kDepth; step += 16) {
    typename P::Sums part = {};
#pragma unroll 1  // else more loads are hoisted than there are registers
    for (int k = step; k < step + 16; k += 4) {
      float x[2 * P::kM][4];
#pragma unroll
      for (int r = 0; r < 2 * P::kM; ++r) {
        if constexpr (kLeftLies == Lies::along) {
          load4(left + Left::at(row0 + 8 * r, k), x[r]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) x[r][e] = left[Left::at(k + e, row0 + 8 * r)];
        }
      }
#pragma unroll
      for (int n = 0; n < P::kN; ++n) {
        float y[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (kRightLies == Lies::along) {
            load4(right + Right::at(col0 + 8 * n + i, k), y[i]);
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) y[i][e] = right[Right::at(k + e, col0 + 8 * n + i)];
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int r = 0; r < 2 * P::kM; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& sum = part[r / 2][n][r % 2 * 2 + i];
              sum = fmaf(x[r][e], y[i][e], sum);
            }
      }
    }
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int n = 0; n < P::kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] += part[m][n][i];
  }
}

// `tiles` tiles one after another, each over `steps` steps of depth (none: zeros).
// load(tile, step, left, right) starts the copies of a step, finish(tile, sums) takes the sums.
template <class P, Lies kLeftLies, Lies kRightLies, class Load, class Finish>
__device__ inline void run_product(char* memory, int tiles, int steps, const Load& load,
                                   const Finish& finish) {
  using T = typename P::T;
  constexpr int kAhead = P::kStages - 1;
  T* const stages = reinterpret_cast<T*>(memory);
  typename P::Sums sums = {};
  if (steps == 0) {
    for (int tile = 0; tile < tiles; ++tile) finish(tile, sums);
    return;
  }
  const auto after = [](int stage) { return stage + 1 == P::kStages ? 0 : stage + 1; };
  int next_tile = 0, next_step = 0, next_stage = 0;
  const auto load_next = [&] {
    if (next_tile < tiles) {
      T* const to = stages + next_stage * (P::kLeft + P::kRight);
      load(next_tile, next_step, to, to + P::kLeft);
      next_stage = after(next_stage);
      if (++next_step == steps) next_step = 0, ++next_tile;
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) load_next();
  int stage = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step, stage = after(stage)) {
      copy_wait<kAhead - 1>();
      __syncthreads();  // this step is there; the one before it has been read
      load_next();
      const T* const left = stages + stage * (P::kLeft + P::kRight);
      if constexpr (P::kMma) {
        multiply_mma<P, kLeftLies, kRightLies>(left, left + P::kLeft, sums);
      } else {
        multiply_fma<P, kLeftLies, kRightLies>(left, left + P::kLeft, sums);
      }
    }
    finish(tile, sums);
#pragma unroll
    for (int m = 0; m < P::kM; ++m)
#pragma unroll
      for (int n = 0; n < P::kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
  }
}

}  // namespace tenfold::cuda
