// SPDX-License-Identifier: Apache-2.0
// See pixels/patches.h: errors of predicted patches, and their derivatives in the same pass. The
// target is rebuilt in registers from the patch in the first cache. Sums of a patch are lane by
// lane, in an order that nothing but its size decides.
#include "pixels/cpu/patch_kernels.h"
#include "pixels/cpu/patch_rows.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kSums = 4;   // independent ones: a sum waits four cycles for the one before
constexpr int kChain = 4;  // terms of each before they are added up: rounding grows with chains
// Bytes that are asked for ahead: so many operations a load leave the window of those that wait too
// short to reach the next row.
constexpr int64_t kAhead = 1536;

enum class Put { no, plain, stream };

// sum (f - y)^2, and to = by (f - y) if there is a `to`, which may be `f`.
template <Put kPut, class T, class Source, class Target>
inline double errors_of(const T* f, Source x, Target y, int64_t n, float by, T* to) {
  const VF slope = set1(by);
  int64_t k = 0;
  double total = 0.0;
  for (; k + kChain * kSums * kWidth <= n; k += kChain * kSums * kWidth) {
    VF sum[kSums] = {};
    for (int i = 0; i < kChain; ++i)
      for (int j = 0; j < kSums; j += 2) {
        const int64_t at = k + (i * kSums + j) * kWidth;
        constexpr int kLine = 64 / (kWidth * static_cast<int>(sizeof(T)));  // vectors of a line
        for (int l = 0; l < 2; l += kLine < 2 ? 1 : 2)
          __builtin_prefetch(reinterpret_cast<const char*>(f + at + l * kWidth) + kAhead);
        const VF e = load(f + at) - y(x(at)), g = load(f + at + kWidth) - y(x(at + kWidth));
        sum[j] = fma(e, e, sum[j]);
        sum[j + 1] = fma(g, g, sum[j + 1]);
        if constexpr (kPut != Put::no)
          store_two<kPut == Put::stream>(to + at, e * slope, g * slope);
      }
    total += static_cast<double>(hsum((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  for (; k < n; k += kWidth) {
    const int left = static_cast<int>(n - k < kWidth ? n - k : kWidth);
    const VF e = select(lanes_below(left), load_n(f + k, left) - y(x(k)), set1(0.0f));
    total += static_cast<double>(hsum(e * e));
    if constexpr (kPut != Put::no) store_n(to + k, e * slope, left);
  }
  return total;
}

template <class T>
T* row_of(const PatchRows& rows, int64_t image, int64_t position) {
  return static_cast<T*>(rows.data) + image * rows.image_step + position * rows.row_step;
}

template <class T>
double errors(const PatchMse& m, double slope, bool past_caches, int64_t begin, int64_t end,
              const PatchMemory& memory) {
  const int64_t n = m.grid.values(), length = m.grid.length();
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  double total = 0.0;
  int64_t image = begin / length, position = begin % length;
  for (int64_t i = begin; i < end; ++i) {
    T* const grad = m.grad.data != nullptr ? row_of<T>(m.grad, image, position) : nullptr;
    const double weight = m.has_target(position) ? m.weights[i + m.shift] : 0.0;
    double error = 0.0;
    if (weight != 0.0) {
      const T* const f = row_of<T>(m.pred, image, position);
      with_patch(m.grid, m.grid.box, m.grid.offset(image, position + m.shift), m.normalize, m.eps,
                 memory, [&](const auto& x, const auto& y) {
                   const auto by = static_cast<float>(slope * weight);
                   if (grad == nullptr) {
                     error = errors_of<Put::no, T>(f, x, y, n, by, nullptr);
                   } else if (!past_caches || !can_stream(grad, bytes)) {
                     error = errors_of<Put::plain, T>(f, x, y, n, by, grad);
                   } else if constexpr (kStreams<T>) {
                     error = errors_of<Put::stream, T>(f, x, y, n, by, grad);
                   } else {
                     auto* const made = reinterpret_cast<T*>(memory.made);
                     error = errors_of<Put::plain, T>(f, x, y, n, by, made);
                     stream_copy(grad, made, bytes);
                   }
                 });
      error /= static_cast<double>(n);
      total += weight * error;
    } else if (grad != nullptr) {
      __builtin_memset(grad, 0, static_cast<uint64_t>(bytes));
    }
    if (m.per_patch != nullptr) m.per_patch[i] = static_cast<float>(error);
    if (++position == length) position = 0, ++image;
  }
  if (past_caches) stream_fence();
  return total;
}

}  // namespace

double patch_errors(const PatchMse& m, Dtype pred, double slope, bool past_caches, int64_t begin,
                    int64_t end, void* work) {
  const PatchMemory memory(work, m.grid.values());
  if (pred == Dtype::f32) return errors<float>(m, slope, past_caches, begin, end, memory);
  if (pred == Dtype::bf16) return errors<bf16_t>(m, slope, past_caches, begin, end, memory);
  return errors<fp16_t>(m, slope, past_caches, begin, end, memory);
}

TENFOLD_ISA_END
