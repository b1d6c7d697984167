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

// Calls f<kW>() for the width of the tiles; float32 has no tile of 64.
template <class T, class F>
void dispatch_width(int64_t head_dim, int64_t value_dim, F&& f) {
  const int64_t dim = head_dim > value_dim ? head_dim : value_dim;
  if constexpr (sizeof(T) == 2) {
    if (dim <= 64) return f.template operator()<64>();
  }
  return dim <= 128 ? f.template operator()<128>() : f.template operator()<256>();
}

}  // namespace tenfold::cuda
