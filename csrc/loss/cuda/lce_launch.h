// SPDX-License-Identifier: Apache-2.0
// The passes of linear_cross_entropy and linear_logprob on the device. Nothing waits for the host.
#pragma once

#include "core/room.h"
#include "loss/cuda/lce_gradients_kernel.cuh"
#include "loss/cuda/lce_sums_kernel.cuh"

namespace tenfold::cuda {

// How much is done at a time. Results depend on `segment` and `ranges` only.
struct LceLimits {
  int64_t chunk_rows = 8192;  // a multiple of the tile's
  int64_t segment = 4096;     // of the vocabulary: sums of that many are added in order
  int64_t delta_bytes = int64_t{64} << 20;  // of d: as much as the second cache holds, about
  int64_t split_bytes = int64_t{64} << 20;
  int64_t blocks = 256;  // that fill the device
  int64_t ranges = 128;  // of the vocabulary, per row, to twice as many
};

// Allocates and fills what a call needs of its rows; `a.to` is not read.
inline PackedRows pack_rows(CountArgs a, bool gradients, const Room& room, cudaStream_t stream) {
  const auto ints = [&](int64_t n) { return static_cast<int*>(room(n * 4)); };
  const auto floats = [&](int64_t n) { return static_cast<float*>(room(n * 4)); };
  PackedRows& to = a.to;
  to.state = static_cast<LceState*>(room(sizeof(LceState)));
  to.row = ints((a.rows + 127) / 128 * 128);  // read a step of depth at a time
  to.target = ints(a.rows), to.place = ints(a.rows);
  to.weight = floats(a.rows), to.chosen = floats(a.rows);
  to.slopes = nullptr;
  if (gradients)
    to.slopes = static_cast<LceRow*>(room(a.rows * static_cast<int64_t>(sizeof(LceRow))));
  TENFOLD_LAUNCH(count_rows_kernel, 1, kRowsThreads, stream, a);
  return to;
}

// lse, and of the others those that `out` wants. out: all but rows, first, ranges and parts.
template <class T>
void lce_forward(const LceMatrices& m, const PackedRows& rows, int64_t num_rows, JoinArgs out,
                 const LceLimits& limits, const Room& room, cudaStream_t stream);

// Gradients, or null, [num_rows, dim] and [vocab, dim], contiguous, from rows.slopes.
template <class T>
void lce_backward(const LceMatrices& m, const PackedRows& rows, int64_t num_rows, void* grad_hidden,
                  void* grad_weight, const LceLimits& limits, const Room& room,
                  cudaStream_t stream);

// weight: or null, the sum of the weights.
inline void launch_total_loss(const PackedRows& rows, const float* losses, bool mean, float* loss,
                              cudaStream_t stream, float* weight = nullptr) {
  TENFOLD_LAUNCH(total_loss_kernel, 1, kRowsThreads, stream,
                 static_cast<const LceState*>(rows.state), losses, mean, loss, weight);
}

inline void launch_slopes(const SlopesArgs& a, cudaStream_t stream) {
  TENFOLD_LAUNCH(slopes_kernel, 1, kRowsThreads, stream, a);
}

}  // namespace tenfold::cuda
