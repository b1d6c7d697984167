// SPDX-License-Identifier: Apache-2.0
#include "attention/cuda/dha_attention_kernel.cuh"

namespace tenfold::cuda {

template void launch_dha_attention<float, 128, true>(const ForwardArgs&, cudaStream_t);

}  // namespace tenfold::cuda
