// SPDX-License-Identifier: Apache-2.0
// Launches of lce_launch.h.
#pragma once

#include <algorithm>

#include "loss/cuda/lce_launch.h"

namespace tenfold::cuda {

template <class T>
void lce_forward(const LceMatrices& m, const PackedRows& rows, int64_t num_rows, JoinArgs out,
                 const LceLimits& limits, const Room& room, cudaStream_t stream) {
  using P = ProductTile<T>;
  if (num_rows == 0) return;
  LceSumsArgs a{};
  a.m = m, a.rows = out.rows = rows;
  const int64_t tiles = cuts(m.vocab, P::kCols), chunk = std::min(num_rows, limits.chunk_rows);
  a.tiles_of_range = static_cast<int>(std::max<int64_t>(1, tiles / limits.ranges));
  a.ranges = out.ranges = static_cast<int>(cuts(tiles, a.tiles_of_range));
  a.parts =
      static_cast<RangeSums*>(room(chunk * a.ranges * static_cast<int64_t>(sizeof(RangeSums))));
  out.parts = a.parts;
  for (int64_t first = 0; first < num_rows; first += chunk) {
    const int64_t here = std::min(chunk, num_rows - first);
    a.first = out.first = first;
    a.row_tiles = static_cast<int>(cuts(here, P::kRows));
    const auto blocks = static_cast<unsigned>(a.row_tiles * a.ranges);
    const auto launch = [&](auto kernel) {
      TENFOLD_LAUNCH_SHARED(kernel, blocks, P::kThreads, P::kBytes, P::kBytes, stream, a);
    };
    if (out.entropy != nullptr) {
      launch(lce_sums_kernel<T, false, true>);  // of linear_logprob, which has no softcap
    } else if (m.softcap > 0.0f) {
      launch(lce_sums_kernel<T, true, false>);
    } else {
      launch(lce_sums_kernel<T, false, false>);
    }
    TENFOLD_LAUNCH(join_ranges_kernel, static_cast<unsigned>(cuts(here, kJoinRowsThreads / 32)),
                   kJoinRowsThreads, stream, out);
  }
}

// grad_hidden of a chunk and a block of the vocabulary, segment by segment, several at a time where
// the tiles alone would not fill the device.
template <class T>
void launch_hidden(LceHiddenArgs a, int64_t splits, cudaStream_t stream) {
  using P = ProductTile<T>;
  const int64_t segments = cuts(a.block.tokens, a.segment);
  for (int64_t s = 0; s < segments; s += splits) {
    a.token = s * a.segment;
    a.splits = static_cast<int>(std::min(splits, segments - s));
    const auto blocks = static_cast<unsigned>(int64_t{a.block.row_tiles} * a.col_tiles * a.splits);
    TENFOLD_LAUNCH_SHARED(lce_hidden_kernel<T>, blocks, P::kThreads, P::kBytes, P::kBytes, stream,
                          a);
    if (a.splits > 1)
      TENFOLD_LAUNCH(add_splits_kernel, static_cast<unsigned>(a.block.rows), kAddThreads, stream,
                     a);
    a.add = true;
  }
}

template <class T>
void lce_backward(const LceMatrices& m, const PackedRows& rows, int64_t num_rows, void* grad_hidden,
                  void* grad_weight, const LceLimits& limits, const Room& room,
                  cudaStream_t stream) {
  using P = ProductTile<T>;
  constexpr int64_t kSize = sizeof(T);
  const bool of_hidden = grad_hidden != nullptr && num_rows > 0, of_weight = grad_weight != nullptr;
  if (!of_hidden && !of_weight) return;
  const int64_t chunk = std::min(std::max<int64_t>(num_rows, 1), limits.chunk_rows);
  const int64_t chunks = std::max<int64_t>(1, cuts(num_rows, chunk));
  const int64_t most = limits.delta_bytes / (chunk * kSize) / limits.segment * limits.segment;
  const int64_t width =
      std::min(std::max(most, limits.segment), cuts(m.vocab, P::kCols) * P::kCols);

  LceBlock block{};
  block.pitch = width;
  block.d = room(chunk * width * kSize);
  block.d_weight = nullptr;
  if (std::is_same_v<T, fp16_t> && of_weight) block.d_weight = room(chunk * width * kSize);
  LceHiddenArgs hidden{};
  hidden.m = m, hidden.rows = rows, hidden.segment = limits.segment;
  hidden.col_tiles = static_cast<int>(cuts(m.dim, P::kCols));
  int64_t splits = 1;
  if (of_hidden) {
    hidden.sums = static_cast<float*>(room(num_rows * m.dim * 4));
    const int64_t tiles = cuts(chunk, P::kRows) * hidden.col_tiles;
    splits = std::min({cuts(limits.blocks, tiles), cuts(width, limits.segment),
                       std::max<int64_t>(1, limits.split_bytes / (chunk * m.dim * 4))});
    if (splits > 1) hidden.parts = static_cast<float*>(room(splits * chunk * m.dim * 4));
  }
  auto* const weight_sums = of_weight && chunks > 1
                                ? static_cast<float*>(room(std::min(width, m.vocab) * m.dim * 4))
                                : nullptr;
  for (block.v = 0; block.v < m.vocab; block.v += width) {
    block.tokens = std::min(width, m.vocab - block.v);
    for (int64_t i = 0; i < chunks; ++i) {
      block.first = i * chunk;
      block.rows = std::min(chunk, num_rows - block.first);
      block.row_tiles = static_cast<int>(cuts(block.rows, P::kRows));
      const int64_t deltas = block.row_tiles * cuts(block.tokens, P::kCols);
      if (deltas > 0) {
        const auto kernel =
            m.softcap > 0.0f ? lce_deltas_kernel<T, true> : lce_deltas_kernel<T, false>;
        TENFOLD_LAUNCH_SHARED(kernel, static_cast<unsigned>(deltas), P::kThreads, P::kBytes,
                              P::kBytes, stream, (LceDeltasArgs{m, rows, block}));
      }
      if (of_weight) {
        const bool last = i + 1 == chunks;
        const LceWeightArgs a{
            m,
            rows,
            block,
            hidden.col_tiles,
            i > 0 ? weight_sums : nullptr,
            last ? static_cast<T*>(grad_weight) + block.v * m.dim : static_cast<void*>(weight_sums),
            last};
        const int64_t tiles = cuts(block.tokens, P::kRows) * hidden.col_tiles;
        TENFOLD_LAUNCH_SHARED(lce_weight_kernel<T>, static_cast<unsigned>(tiles), P::kThreads,
                              P::kBytes, P::kBytes, stream, a);
      }
      if (of_hidden) {
        hidden.block = block, hidden.add = block.v > 0;
        launch_hidden<T>(hidden, splits, stream);
      }
    }
  }
  if (of_hidden)
    TENFOLD_LAUNCH(store_hidden_kernel<T>, static_cast<unsigned>(num_rows), kStoreThreads, stream,
                   (StoreHiddenArgs{rows, hidden.sums, m.dim, grad_hidden}));
}

}  // namespace tenfold::cuda
