// SPDX-License-Identifier: Apache-2.0
// Device code of sequence_nll, of the rows of selective_logprob: a block adds up the
// log-probabilities of a sequence, and counts its positions.
#pragma once

#include "core/scan.cuh"
#include "loss/cuda/selective_logprob_kernel.cuh"

namespace tenfold::cuda {

constexpr int kSequenceThreads = 256;

struct SequenceSums {
  const float* logp;  // [B, S], 0 where a position does not count
  IntArray labels;
  int64_t batch, length, ignored;
  float* nll_sum;
  int64_t* count;
};

static __global__ void __launch_bounds__(kSequenceThreads) sequence_sums_kernel(SequenceSums a) {
  constexpr int kWarps = kSequenceThreads / 32;
  TENFOLD_SHARED(double, sums, kWarps);
  TENFOLD_SHARED(int64_t, counts, kWarps);
  const int64_t begin = blockIdx.x * a.length;
  double sum = 0.0;
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < a.length; i += kSequenceThreads) {
    if (a.labels[begin + i] == a.ignored) continue;
    sum -= a.logp[begin + i];
    ++count;
  }
  count = warp_sum(count);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = sum;
    counts[threadIdx.x / 32] = count;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w], count += counts[w];
  a.nll_sum[blockIdx.x] = static_cast<float>(sum);
  a.count[blockIdx.x] = count;
}

// rows: of with_chunks.
template <class T>
void launch_sequence_nll(const LogprobArgs& rows, const SequenceSums& sums, cudaStream_t stream) {
  launch_selective_logprob<T, true>(rows, stream);
  if (sums.batch > 0)
    TENFOLD_LAUNCH(sequence_sums_kernel, static_cast<unsigned>(sums.batch), kSequenceThreads,
                   stream, sums);
}

}  // namespace tenfold::cuda
