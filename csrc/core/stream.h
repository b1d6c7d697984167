// SPDX-License-Identifier: Apache-2.0
// The current CUDA stream and error checks, without linking any CUDA library of torch.
// libtorch_cuda is looked up among the libraries that the process has already loaded, at first use;
// so one binary imports on CPU-only torch and on every CUDA build of it.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "core/check.h"

namespace tenfold::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    raise(ErrorKind::runtime, "tenfold: the NVIDIA driver supports CUDA ", driver / 1000, ".",
          driver % 1000 / 10, ", this build needs CUDA ", runtime / 1000, ".", runtime % 1000 / 10,
          " (driver 580 or newer for CUDA 13); update the driver");
  }
  raise(ErrorKind::runtime, "tenfold: ", what, ": ", cudaGetErrorString(status));
}

#define TENFOLD_CUDA_CHECK(call) ::tenfold::cuda::check_cuda((call), #call)

inline cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol =
        library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (get == nullptr)
    raise(ErrorKind::runtime, "tenfold: this torch has no CUDA (libtorch_cuda is not loaded)");
  void* stream = nullptr;
  if (get(device, &stream) != 0)
    raise(ErrorKind::runtime, "tenfold: torch gave no current CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Device guard and stream of one op call.
struct Launch {
  explicit Launch(const Tensor& t)
      : guard(t.get_device_index()), stream(current_stream(t.get_device_index())) {}
  void check() const { TENFOLD_CUDA_CHECK(cudaGetLastError()); }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace tenfold::cuda
