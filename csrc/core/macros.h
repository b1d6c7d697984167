// Markers shared by host, device and emulated code.
#pragma once

#if defined(__CUDACC__)
#define TENFOLD_HD __host__ __device__ inline
#else
#define TENFOLD_HD inline
#endif
