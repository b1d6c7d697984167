// SPDX-License-Identifier: Apache-2.0
// torch.ops.tenfold._peak(kind, iters): measured ceilings on all threads, for bench/ only.
// kind: "fma_fp32", "dot_bf16" (GFLOP/s; 0 if the ISA has none), "copy" (GB/s read + written) or
// "read" (GB/s).
#include "core/cpu/peak.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string_view>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"

namespace tenfold {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double compute_peak(bool bf16, int64_t iters, int64_t threads) {
  std::vector<double> flops(threads);
  const auto begin = std::chrono::steady_clock::now();
  parallel_for(threads, 1e6, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float sink[2] = {0.999f, 0.001f};
      flops[t] = bf16 ? TENFOLD_ISA_CALL(peak_dot_bf16, iters, sink)
                      : TENFOLD_ISA_CALL(peak_fma_fp32, iters, sink);
    }
  });
  const double seconds = seconds_since(begin);
  double total = 0.0;
  for (const double f : flops) total += f;
  return total / seconds * 1e-9;
}

// Of a thread's share: together at least twice the last cache, which may be shared with others.
int64_t stream_bytes(int64_t threads) {
  constexpr int64_t kLeast = int64_t{64} << 20, kPage = 4096;
  const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 0);
  return std::max(kLeast, 2 * cache / threads / kPage * kPage);
}

double copy_peak(int64_t iters, int64_t threads) {
  const int64_t bytes = stream_bytes(threads);
  std::vector<char> from(threads * bytes, 1), to(threads * bytes, 2);
  double best = 1e9;
  for (int64_t i = 0; i < std::max<int64_t>(iters, 1); ++i) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(threads, 1e6, [&](int64_t first, int64_t last) {
      std::memcpy(to.data() + first * bytes, from.data() + first * bytes, (last - first) * bytes);
    });
    best = std::min(best, seconds_since(begin));
  }
  return 2.0 * static_cast<double>(threads * bytes) / best * 1e-9;
}

double read_peak(int64_t iters, int64_t threads) {
  const int64_t bytes = stream_bytes(threads);
  const int64_t floats = bytes / static_cast<int64_t>(sizeof(float));
  const std::vector<float> data(threads * floats, 1.0f);
  std::vector<float> sums(threads);
  double best = 1e9;
  for (int64_t i = 0; i < std::max<int64_t>(iters, 1); ++i) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(threads, 1e6, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        sums[t] = TENFOLD_ISA_CALL(peak_read, data.data() + t * floats, floats);
    });
    best = std::min(best, seconds_since(begin));
  }
  return static_cast<double>(threads * bytes) / best * 1e-9;
}

double peak_op(std::string_view kind, int64_t iters) {
  const int64_t threads = torch::stable::get_num_threads();
  if (kind == "fma_fp32") return compute_peak(false, iters, threads);
  if (kind == "dot_bf16") return compute_peak(true, iters, threads);
  if (kind == "read") return read_peak(iters, threads);
  TENFOLD_CHECK_VALUE(kind == "copy",
                      "tenfold::_peak: kind must be 'fma_fp32', 'dot_bf16', "
                      "'copy' or 'read', got '",
                      kind, "'");
  return copy_peak(iters, threads);
}

}  // namespace
}  // namespace tenfold

STABLE_TORCH_LIBRARY_FRAGMENT(tenfold, m) {
  m.def("_peak(str kind, int iters) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(tenfold, CompositeExplicitAutograd, m) {
  m.impl("_peak", TORCH_BOX(&tenfold::peak_op));
}
