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

}  // namespace tenfold::cuda
