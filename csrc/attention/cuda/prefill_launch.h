// Launchers of dha_attention, instantiated in one source per width so that each compiles quickly.
#pragma once

#include "attention/cuda/prefill_work.cuh"

namespace tenfold::cuda {

using ForwardArgs = OnDevice<AttentionForward>;

// Blocks of the launch below.
template <class T, int kW>
int64_t forward_blocks(const ForwardArgs& p);

template <class T, int kW>
void launch_dha_attention(const ForwardArgs& p, cudaStream_t stream);

struct BackwardArgs : OnDevice<AttentionBackward> {
  float* delta;  // in the memory order of lse
  bool dout_vectors, dq_vectors, dk_vectors, dv_vectors;
};

enum class Grad : int { q, k, v };

template <class T, int kW, Grad kGrad>
int64_t backward_blocks(const BackwardArgs& p);

// The one of q makes delta first, which the others read.
template <class T, int kW, Grad kGrad>
void launch_dha_backward(const BackwardArgs& p, cudaStream_t stream);

}  // namespace tenfold::cuda
