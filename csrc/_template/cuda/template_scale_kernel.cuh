// SPDX-License-Identifier: Apache-2.0
// Device code of template_scale: one thread per element, grid-stride.
#pragma once

#include "core/convert.cuh"

namespace tenfold::cuda {

constexpr int kScaleThreads = 256;

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    template_scale_kernel(const T* x, T* y, int64_t n, float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kScaleThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x; i < n; i += step)
    from_float(to_float(x[i]) * scale, y + i);
}

template <class T>
void launch_template_scale(const T* x, T* y, int64_t n, float scale, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t blocks = (n + kScaleThreads - 1) / kScaleThreads;
  TENFOLD_LAUNCH(template_scale_kernel<T>, static_cast<unsigned>(blocks < 4096 ? blocks : 4096),
                 kScaleThreads, stream, x, y, n, scale);
}

}  // namespace tenfold::cuda
