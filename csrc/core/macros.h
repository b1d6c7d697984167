// SPDX-License-Identifier: Apache-2.0
// Markers shared by host, device and emulated code. Internal linkage, so that a copy compiled for
// one CPU ISA can never be linked into code for another.
#pragma once

#if defined(__CUDACC__)
#define TENFOLD_HD __host__ __device__ static inline
#define TENFOLD_HD_MEMBER __host__ __device__ inline
#else
#define TENFOLD_HD static inline
#define TENFOLD_HD_MEMBER inline
#endif
