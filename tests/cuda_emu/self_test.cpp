// SPDX-License-Identifier: Apache-2.0
// The emulation's own kernels: what must work, and planted faults that it must catch.
// Usage: self_test NAME [schedule seed]; prints a checksum, or ends with a report.
#define TENFOLD_CUDA_EMU
#include <algorithm>
#include <numeric>

#include "core/launch.cuh"

namespace tenfold::cuda {
float emu_to_float(bf16_t x) {
  return x.bits;
}
float emu_to_float(fp16_t x) {
  return x.bits;
}
}  // namespace tenfold::cuda

namespace {

constexpr int kThreads = 96;

// Reverses a block's numbers through shared memory; without the barrier it is a race.
template <bool kBarrier>
__global__ void reverse_kernel(const int* in, int* out) {
  TENFOLD_SHARED(int, tile, kThreads);
  tile[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if constexpr (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void warp_kernel(const int* in, int* out) {
  int x = in[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  const unsigned votes = __ballot_sync(0xFFFFFFFFu, in[threadIdx.x] % 3 == 0);
  const int first = __shfl_sync(0xFFFFFFFFu, in[threadIdx.x], 0);
  out[threadIdx.x] = x + __popc(votes) * 100000 + first * 1000000;
}

__global__ void atomic_kernel(const int* in, int* out) {
  TENFOLD_SHARED(int, sum, 1);
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  atomicAdd(&sum[0], in[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = sum[0];
}

__global__ void divergent_kernel(const int*, int*) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_exit_kernel(const int*, int*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void shared_overrun_kernel(const int*, int* out) {
  TENFOLD_SHARED(int, tile, kThreads);
  tile[threadIdx.x + 1] = 1;  // the last thread writes one past the end
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void global_overrun_kernel(const int*, int* out) {
  out[threadIdx.x + 1] = 1;
}

__global__ void large_kernel(const int* in, int* out) {
  TENFOLD_SHARED(int, tile, 12 << 10);
  TENFOLD_SHARED(int, more, 1);  // with which there are more than 48 KB
  tile[threadIdx.x] = more[0] = in[0];
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void mma_kernel(float* out) {  // A = i + j, B = identity: D = the first 8 columns of A
  const int lane = threadIdx.x, row = lane / 4, col = lane % 4 * 2;
  const auto pack = [](int lo, int hi) {
    return static_cast<uint32_t>(lo) | static_cast<uint32_t>(hi) << 16;
  };
  const uint32_t a[4] = {pack(row + col, row + col + 1), pack(row + 8 + col, row + 9 + col),
                         pack(row + col + 8, row + col + 9), pack(row + col + 16, row + col + 17)};
  const uint32_t b[2] = {pack(col == row, col + 1 == row), 0};
  float d[4] = {};
  tenfold::cuda::mma_m16n8k16<tenfold::bf16_t>(d, a, b);
  out[row * 8 + col] = d[0];
  out[row * 8 + col + 1] = d[1];
  out[(row + 8) * 8 + col] = d[2];
  out[(row + 8) * 8 + col + 1] = d[3];
}

// Lane l offers row l of a 32 x 8 matrix of numbers: matrix i holds rows 8 i .. 8 i + 7.
__global__ void matrices_kernel(int* out) {
  TENFOLD_SHARED(uint16_t, rows, 32 * 8);
  for (int i = 0; i < 8; ++i)
    rows[threadIdx.x * 8 + i] = static_cast<uint16_t>(threadIdx.x * 8 + i);
  __syncwarp();
  uint32_t plain[4], turned[4];
  tenfold::cuda::load_matrices(plain, rows + threadIdx.x * 8);
  tenfold::cuda::load_matrices_transposed(turned, rows + threadIdx.x * 8);
  for (int i = 0; i < 2; ++i) {
    out[4 * threadIdx.x + 2 * i] = static_cast<int>(plain[3 * i]);
    out[4 * threadIdx.x + 2 * i + 1] = static_cast<int>(turned[3 * i]);
  }
}

// Two groups of copies into dynamic shared memory, the second one with zeros. kWait: groups that
// may be on their way when it reads; more than 0 is a planted fault.
template <int kWait>
__global__ void copy_kernel(const int* in, int* out) {
  TENFOLD_DYNAMIC_SHARED(memory);
  int* tile = reinterpret_cast<int*>(memory);
  tenfold::cuda::copy16_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  tenfold::cuda::copy_commit();
  tenfold::cuda::copy16_async(tile + 96 + 4 * threadIdx.x, in, false);
  tenfold::cuda::copy_commit();
  tenfold::cuda::copy_wait<kWait>();
  __syncthreads();
  for (int i = threadIdx.x; i < 192; i += 24) out[i] = tile[i];
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argv[1];
  cuda_emu::machine().schedule_seed = argc > 2 ? std::atoi(argv[2]) : 1;
  std::vector<int> in(2 * kThreads), out(2 * kThreads, -1);
  std::iota(in.begin(), in.end(), 5);
  const auto run = [&](auto kernel, int blocks) {
    TENFOLD_LAUNCH(kernel, blocks, kThreads, nullptr, in.data(), out.data());
  };
  if (name == "barrier") run(reverse_kernel<true>, 2);
  if (name == "race") run(reverse_kernel<false>, 2);
  if (name == "warp") run(warp_kernel, 1);
  if (name == "atomic") run(atomic_kernel, 1);
  if (name == "divergent") run(divergent_kernel, 1);
  if (name == "early_exit") run(early_exit_kernel, 1);
  if (name == "no_blocks") run(warp_kernel, 0);
  if (name == "large") run(large_kernel, 1);
  if (name == "shared_overrun") run(shared_overrun_kernel, 1);
  if (name == "global_overrun") {
    std::vector<int> exact(kThreads);
    TENFOLD_LAUNCH(global_overrun_kernel, 1, kThreads, nullptr, in.data(), exact.data());
  }
  if (name == "mma") {
    std::vector<float> d(16 * 8);
    TENFOLD_LAUNCH(mma_kernel, 1, 32, nullptr, d.data());
    out.assign(d.begin(), d.end());
  }
  if (name == "matrices") TENFOLD_LAUNCH(matrices_kernel, 1, 32, nullptr, out.data());
  const auto copies = [&](auto kernel) {
    alignas(16) int aligned[2 * kThreads];
    std::copy(in.begin(), in.end(), aligned);
    TENFOLD_LAUNCH_SHARED(kernel, 1, 24, 192 * sizeof(int), 192 * sizeof(int), nullptr, aligned,
                          out.data());
  };
  if (name == "copies") copies(copy_kernel<0>);
  if (name == "unfinished_copies") copies(copy_kernel<2>);
  for (const int x : out) std::printf("%d ", x);
  std::printf("\n");
}
