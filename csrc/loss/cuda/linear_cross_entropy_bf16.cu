// SPDX-License-Identifier: Apache-2.0
#include "loss/cuda/lce_launch.cuh"

namespace tenfold::cuda {

template void lce_forward<bf16_t>(const LceMatrices&, const PackedRows&, int64_t, JoinArgs,
                                  const LceLimits&, const Room&, cudaStream_t);
template void lce_backward<bf16_t>(const LceMatrices&, const PackedRows&, int64_t, void*, void*,
                                   const LceLimits&, const Room&, cudaStream_t);

}  // namespace tenfold::cuda
