// SPDX-License-Identifier: Apache-2.0
// See pixels/patches.h. A patch is gathered into the first cache in the order of its values, which
// turns every layout, stride and odd size into loops over neighbours.
#include "pixels/cpu/patch_kernels.h"
#include "pixels/cpu/patch_rows.h"

TENFOLD_ISA_BEGIN
namespace {

template <class T, class Source, class Target>
inline void write_row(const Source& x, const Target& y, int64_t n, bool past_caches,
                      const PatchMemory& memory, T* to) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  if (!past_caches || !can_stream(to, bytes)) return write_values<false>(x, y, n, to);
  if constexpr (kStreams<T>) {
    write_values<true>(x, y, n, to);
  } else {
    auto* const made = reinterpret_cast<T*>(memory.made);
    write_values<false>(x, y, n, made);
    stream_copy(to, made, bytes);
  }
}

// Values of patches as they come, one image row of patches after the other.
struct Walk {
  const PatchGrid& g;
  int64_t image, patch;
  Walk(const PatchGrid& grid, int64_t begin)
      : g(grid), image(begin / grid.length()), patch(begin % grid.length()) {}
  inline int64_t offset() const { return g.offset(image, patch); }
  inline void next() {
    if (++patch == g.length()) patch = 0, ++image;
  }
};

template <class T>
void put_patch(const PatchGrid& g, const T* from, int64_t offset, const float* mean,
               const float* deviation, const PatchMemory& memory) {
  const int64_t n = g.values();
  const VF shift = set1(mean != nullptr ? *mean : 0.0f);
  const VF scale = set1(deviation != nullptr ? *deviation : 1.0f);
  const auto value = [&](int64_t k) {
    const VF x = n - k >= kWidth ? load(from + k) : load_n(from + k, static_cast<int>(n - k));
    return fma(x, scale, shift);
  };
  const auto put = [&]<class E>(E* image, auto write) {
    auto* const made = reinterpret_cast<E*>(memory.made);
    for (int64_t k = 0; k < n; k += kWidth) write(made + k, value(k));
    move_patch<false, E>(image + offset, g.box, made);
  };
  auto* const image = const_cast<void*>(g.data);
  switch (g.pixel) {
    case Pixel::u8:
      return put(static_cast<uint8_t*>(image), [](uint8_t* to, VF x) {
        // NaN gives 0. Adding 2^23 rounds to a whole number, which the lowest bits then are.
        const VF level = vmin(vmax(x, set1(0.0f)), set1(1.0f)) * set1(255.0f);
        store_low_bytes(to, bits(level + set1(8388608.0f)));
      });
    case Pixel::f32: return put(static_cast<float*>(image), [](float* to, VF x) { store(to, x); });
    case Pixel::bf16:
      return put(static_cast<bf16_t*>(image), [](bf16_t* to, VF x) { store(to, x); });
    case Pixel::f16:
      return put(static_cast<fp16_t*>(image), [](fp16_t* to, VF x) { store(to, x); });
  }
}

template <class T>
void put_patches(const PatchGrid& g, const PatchIn& in, int64_t begin, int64_t end,
                 const PatchMemory& memory) {
  Walk at(g, begin);
  for (int64_t i = begin; i < end; ++i, at.next()) {
    const T* const from = static_cast<const T*>(in.rows.data) + at.image * in.rows.image_step +
                          at.patch * in.rows.row_step;
    put_patch(g, from, at.offset(), in.mean != nullptr ? in.mean + i : nullptr,
              in.deviation != nullptr ? in.deviation + i : nullptr, memory);
  }
}

}  // namespace

void patchify_some(const PatchGrid& grid, const PatchOut* outs, int count, int64_t begin,
                   int64_t end, void* work) {
  const int64_t n = grid.values();
  const PatchMemory memory(work, n);
  Walk at(grid, begin);
  bool streamed = false;
  for (int64_t i = begin; i < end; ++i, at.next())
    for (int o = 0; o < count; ++o) {
      const PatchOut& out = outs[o];
      streamed |= out.past_caches;
      with_patch(grid, out.box, at.offset(), out.normalize, out.eps, memory,
                 [&](const auto& x, const auto& y) {
                   const auto write = [&]<class T>(T* to) {
                     write_row(x, y, n, out.past_caches, memory, to + i * n);
                   };
                   if (out.dtype == Dtype::f32) write(static_cast<float*>(out.data));
                   if (out.dtype == Dtype::bf16) write(static_cast<bf16_t*>(out.data));
                   if (out.dtype == Dtype::f16) write(static_cast<fp16_t*>(out.data));
                 });
    }
  if (streamed) stream_fence();
}

void unpatchify_some(const PatchGrid& grid, const PatchIn& in, int64_t begin, int64_t end,
                     void* work) {
  const PatchMemory memory(work, grid.values());
  if (in.dtype == Dtype::f32) put_patches<float>(grid, in, begin, end, memory);
  if (in.dtype == Dtype::bf16) put_patches<bf16_t>(grid, in, begin, end, memory);
  if (in.dtype == Dtype::f16) put_patches<fp16_t>(grid, in, begin, end, memory);
}

bool patches_in_unit_range(const PatchGrid& grid, int64_t begin, int64_t end, void* work) {
  const int64_t n = grid.values();
  const PatchMemory memory(work, n);
  Walk at(grid, begin);
  const VF zero = set1(0.0f), one = set1(1.0f);
  bool inside = true;
  for (int64_t i = begin; i < end && inside; ++i, at.next())
    with_patch(grid, grid.box, at.offset(), false, 0.0, memory, [&](const auto& x, const auto& y) {
      for (int64_t k = 0; k < n; k += kWidth) {
        const VF v = select(lanes_below(n - k), y(x(k)), zero);
        inside &= bits_of(both(ge(v, zero), ge(one, v))) == (1u << kWidth) - 1u;
      }
    });
  return inside;
}

TENFOLD_ISA_END
