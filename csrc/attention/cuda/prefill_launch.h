// SPDX-License-Identifier: Apache-2.0
// Launchers of dha_attention, instantiated in one source per width so that each compiles quickly.
#pragma once

#include "attention/cuda/prefill_work.cuh"

namespace tenfold::cuda {

using ForwardArgs = OnDevice<AttentionForward>;

// Blocks of the launch below.
template <class T, int kW>
int64_t forward_blocks(const ForwardArgs& p);

// kT5: with what only t5_attention has, a relative bias, dropout and kv_len.
template <class T, int kW, bool kT5 = false>
void launch_dha_attention(const ForwardArgs& p, cudaStream_t stream);

struct BackwardArgs : OnDevice<AttentionBackward> {
  float* delta;  // in the memory order of lse
  // Sums of dS by distance, or null: [H][blocks of a head][warps][sums_pitch]; that of relative
  // position r is at sums_pitch / 2 + r.
  float* sums;
  int sums_pitch;
  bool dout_vectors, dq_vectors, dk_vectors, dv_vectors;
};

enum class Grad : int { q, k, v };

// Warps of all blocks of a head, each with sums of its own; and how many sums those are.
template <class T, int kW>
int64_t sums_of_head(const BackwardArgs& p);
template <class T, int kW>
int sums_pitch(int reach);

template <class T, int kW, Grad kGrad>
int64_t backward_blocks(const BackwardArgs& p);

// The one of q makes delta first, which the others read.
template <class T, int kW, Grad kGrad, bool kT5 = false>
void launch_dha_backward(const BackwardArgs& p, cudaStream_t stream);

}  // namespace tenfold::cuda
