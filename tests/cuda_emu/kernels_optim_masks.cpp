// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated mask operations of `optim`, for ctypes. The launch code is the
// kernels' own.
#define TENFOLD_CUDA_EMU
#include "entry.h"  // after the kernels
#include "optim/cuda/grad_norm_kernel.cuh"
#include "optim/cuda/linear_wgrad_rows_kernel.cuh"
#include "optim/cuda/mask_bits_kernel.cuh"
#include "optim/cuda/mask_topk_kernel.cuh"
#include "optim/cuda/masked_copy_kernel.cuh"

namespace {

bool on_vectors(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// n: count kind, then per tensor: numel inner dtype
Listed listed(const void* const* from, void* const* to, const void* const* masks, const int64_t* n,
              int64_t i) {
  const auto* bits = static_cast<const uint8_t*>(masks[i]);
  const auto kind = bits == nullptr ? MaskKind::none : static_cast<MaskKind>(n[1]);
  const int64_t* own = n + 2 + 3 * i;
  void* const out = to == nullptr ? nullptr : to[i];
  return {from[i],
          out,
          {kind, bits, own[1]},
          own[0],
          static_cast<int32_t>(own[2]),
          on_vectors(from[i], out)};
}

}  // namespace

API void emu_pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {
  launch_pack(bytes, n, bits, nullptr);
}

API void emu_unpack(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  launch_unpack(bits, n, bytes, nullptr);
}

API void emu_popcount(const uint8_t* bits, int64_t bytes, unsigned long long* total) {
  *total = 0;
  launch_popcount(bits, bytes, total, nullptr);
}

API void emu_prefix(const uint8_t* bits, int64_t bytes, int64_t block, int32_t* prefix) {
  const int64_t step = block / 8, steps = (bytes + step - 1) / step;
  std::vector<int64_t> of_blocks(prefix_blocks(steps));
  launch_prefix(bits, bytes, step, steps, of_blocks.data(), prefix, nullptr);
}

// score null: random words. n: dtype n k seed stream
API void emu_mask_topk(const void* score, uint8_t* bits, const int64_t* n) {
  KeySource source = random_source(n[3], n[4]);
  source.score = score, source.dtype = static_cast<Dtype>(n[0]);
  auto state = std::make_unique<RadixState>();
  std::memset(static_cast<void*>(state.get()), 0xCD, sizeof(RadixState));
  std::vector<int64_t> ties(topk_tiles(n[1]));
  launch_mask_topk({source, n[1], n[2], state.get(), ties.data(), bits}, nullptr);
}

// Dtype numbers of entry.h and of core/types.h are the same.
API void emu_grad_norm(const void* const* grads, const void* const* masks, const int64_t* n,
                       double scale, const float* scale_tensor, float* norm) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < n[0]; ++i) chunks += list_chunks(n[2 + 3 * i]);
  std::vector<double> sums(chunks);
  launch_grad_norm(
      n[0], [&](int64_t i) { return listed(grads, nullptr, masks, n, i); }, sums.data(), chunks,
      scale, scale_tensor, norm, nullptr);
}

// size > 0: copied elements of that many bytes; else rounded to the dtype -size
API void emu_masked_copy(void* const* dst, const void* const* src, const void* const* masks,
                         const int64_t* n, int64_t size) {
  const auto tensor = [&](int64_t i) { return listed(src, dst, masks, n, i); };
  if (size > 0) return launch_masked_copy(n[0], tensor, size, nullptr);
  with_dtype(-size, [&]<class T>() { launch_masked_round<T>(n[0], tensor, nullptr); });
}

// n: dtype T out in R grad_stride input_stride rows_wide
API void emu_linear_wgrad_rows(const void* grad_out, const void* input, const void* rows, void* out,
                               const int64_t* n) {
  const int64_t size = n[0] == 0 ? 4 : 2;
  WgradArgs a{};
  a.grad_out = grad_out, a.input = input, a.out = out;
  a.tokens = n[1], a.num_out = n[2], a.num_cols = n[3], a.num_rows = n[4];
  a.grad_stride = n[5], a.input_stride = n[6];
  a.rows = ints(rows, n[7]);
  a.grad_vectors = on_vectors(grad_out, nullptr) && n[5] * size % 16 == 0;
  a.input_vectors =
      on_vectors(input, nullptr) && n[6] * size % 16 == 0 && a.num_cols * size % 16 == 0;
  a.out_pairs = a.num_cols % 2 == 0;
  with_dtype(n[0], [&]<class T>() { launch_linear_wgrad_rows<T>(a, nullptr); });
}
