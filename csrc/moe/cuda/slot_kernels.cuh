// Sorted slots of a routed batch on the device, and what a token makes of its slots: the stable
// counting sort of moe/sort.h with the token and the weight of every position, sums over a token's
// slots in their order, and the gradient of routing weights. No atomics, nothing waits for the
// host.
#pragma once

#include "core/mma_tile.cuh"
#include "core/scan.cuh"

namespace tenfold::cuda {

constexpr int kSortChunkSlots = 512;  // of a warp
constexpr int kSortThreads = 128;

struct SortSlotsArgs {
  IntArray index;
  const float* weight;  // of slots
  int64_t slots, k, experts, chunks;
  int bits;         // of the number `experts`
  int64_t* counts;  // [experts][chunks] and one more: of slots, then of those before
  int* offsets;     // [experts + 1]
  int *inverse, *token;
  float* factor;  // weight at a position; entries of nobody's positions are not written
};

// Expert of a slot; `experts` of a slot of nobody, and beyond the last one.
__device__ inline int64_t expert_of(const SortSlotsArgs& a, int64_t slot, int64_t end) {
  const int64_t e = slot < end ? a.index[slot] : -1;
  return e >= 0 && e < a.experts ? e : a.experts;
}

// Lanes with the same number.
__device__ inline uint32_t same_number(int64_t x, int bits) {
  uint32_t same = 0xFFFFFFFFu;
  for (int i = 0; i < bits; ++i) {
    const bool mine = (x >> i & 1) != 0;
    const uint32_t set = __ballot_sync(0xFFFFFFFFu, mine);
    same &= mine ? set : ~set;
  }
  return same;
}

// f(slot, expert, the warp's earlier slots of it in these 32, all of them), 32 slots at a time.
template <class F>
__device__ inline void for_chunk(const SortSlotsArgs& a, int64_t chunk, const F& f) {
  const int lane = threadIdx.x % 32;
  const int64_t first = chunk * kSortChunkSlots, next = first + kSortChunkSlots;
  const int64_t end = next < a.slots ? next : a.slots;
  for (int64_t i = first; i < end; i += 32) {
    const int64_t e = expert_of(a, i + lane, end);
    const uint32_t same = same_number(e, a.bits);
    f(i + lane, e, __popc(same & ((1u << lane) - 1u)), __popc(same));
    __syncwarp();
  }
}

static __global__ void __launch_bounds__(kSortThreads) count_slots_kernel(SortSlotsArgs a) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * (kSortThreads / 32) + threadIdx.x / 32;
  if (chunk >= a.chunks) return;
  for (int64_t e = threadIdx.x % 32; e < a.experts; e += 32) a.counts[e * a.chunks + chunk] = 0;
  if (chunk == 0 && threadIdx.x == 0) a.counts[a.experts * a.chunks] = 0;
  __syncwarp();
  for_chunk(a, chunk, [&](int64_t, int64_t e, int before, int all) {
    if (e < a.experts && before == 0) a.counts[e * a.chunks + chunk] += all;
  });
}

// After the counts have been summed up.
static __global__ void __launch_bounds__(kSortThreads) place_slots_kernel(SortSlotsArgs a) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * (kSortThreads / 32) + threadIdx.x / 32;
  if (chunk >= a.chunks) return;
  if (chunk == 0)  // whose counts are where the experts begin, until it moves them
    for (int64_t e = threadIdx.x % 32; e <= a.experts; e += 32)
      a.offsets[e] = static_cast<int>(a.counts[e * a.chunks]);
  __syncwarp();
  const int64_t end = a.slots;
  for_chunk(a, chunk, [&](int64_t slot, int64_t e, int before, int all) {
    const bool some = e < a.experts;
    int64_t* const next = a.counts + e * a.chunks + chunk;
    const int64_t at = some ? *next + before : -1;
    __syncwarp();  // all have read it
    if (some && before == 0) *next += all;
    if (slot >= end) return;
    a.inverse[slot] = static_cast<int>(at);
    if (!some) return;
    a.token[at] = static_cast<int>(slot / a.k);
    a.factor[at] = a.weight[slot];
  });
}

inline void launch_sort_slots(const SortSlotsArgs& a, cudaStream_t stream) {
  const auto blocks =
      static_cast<unsigned>((a.chunks + kSortThreads / 32 - 1) / (kSortThreads / 32));
  TENFOLD_LAUNCH(count_slots_kernel, blocks, kSortThreads, stream, a);
  launch_scan(a.counts, a.experts * a.chunks + 1, stream);
  TENFOLD_LAUNCH(place_slots_kernel, blocks, kSortThreads, stream, a);
}

// out[t] = base[t] + the sum over j of in[inverse[t k + j]], in this order, -1 left out.
struct SumSlotsArgs {
  const int* inverse;
  int64_t tokens, k, cols;
  const void* in;
  int64_t in_stride;
  const float* base;  // or null
  int64_t base_stride;
  void* out;
  int64_t out_stride;
  unsigned strips;
};

constexpr int kSumThreads = 128, kSumEach = 4;

// Four neighbours, aligned.
template <class T>
__device__ inline void get_four(const T* from, float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    load4(from, x);
  } else {
    const uint64_t bits = *reinterpret_cast<const uint64_t*>(from);
    for (int i = 0; i < 4; ++i) x[i] = to_float(T{static_cast<uint16_t>(bits >> (16 * i))});
  }
}

template <class T>
__device__ inline void put_four(T* to, const float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    uint4 bits;
    memcpy(&bits, x, sizeof(bits));
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    *reinterpret_cast<uint64_t*>(to) =
        static_cast<uint64_t>(pack2<T>(x[2], x[3])) << 32 | pack2<T>(x[0], x[1]);
  }
}

// A block: a strip of a token's columns. kFours: rows are whole, aligned groups of four.
template <class In, class T, bool kFours>
__global__ void __launch_bounds__(kSumThreads) sum_slots_kernel(SumSlotsArgs a) {
  const int64_t token = blockIdx.x / a.strips;
  const int64_t first = blockIdx.x % a.strips * int64_t{kSumThreads * kSumEach};
  const int64_t left = a.cols - first,
                end = left < kSumThreads * kSumEach ? left : kSumThreads * kSumEach;
  const auto* const in = static_cast<const In*>(a.in) + first;
  const float* const base = a.base != nullptr ? a.base + token * a.base_stride + first : nullptr;
  T* const out = static_cast<T*>(a.out) + token * a.out_stride + first;
  const int* const at = a.inverse + token * a.k;
  if constexpr (kFours) {
    const int64_t c = static_cast<int64_t>(threadIdx.x) * kSumEach;
    if (c >= end) return;
    float sum[4] = {}, x[4];
    if (base != nullptr) load4(base + c, sum);
    for (int64_t j = 0; j < a.k; ++j) {
      const int64_t row = at[j];
      if (row < 0) continue;
      get_four(in + row * a.in_stride + c, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += x[i];
    }
    put_four(out + c, sum);
  } else {
    for (int64_t c = threadIdx.x; c < end; c += kSumThreads) {
      float sum = base != nullptr ? base[c] : 0.0f;
      for (int64_t j = 0; j < a.k; ++j)
        if (at[j] >= 0) sum += to_float(in[at[j] * a.in_stride + c]);
      from_float(sum, out + c);
    }
  }
}

template <class In, class T>
void launch_sum_slots(SumSlotsArgs a, cudaStream_t stream) {
  if (a.tokens == 0 || a.cols == 0) return;
  constexpr int kStrip = kSumThreads * kSumEach;
  a.strips = static_cast<unsigned>((a.cols + kStrip - 1) / kStrip);
  const auto fours = [](const void* data, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(data) % (4 * size) == 0 && stride % 4 == 0;
  };
  const bool all = a.cols % 4 == 0 && fours(a.in, a.in_stride, sizeof(In)) &&
                   fours(a.out, a.out_stride, sizeof(T)) &&
                   (a.base == nullptr || fours(a.base, a.base_stride, 4));
  const auto kernel = all ? sum_slots_kernel<In, T, true> : sum_slots_kernel<In, T, false>;
  const auto blocks = static_cast<unsigned>(a.tokens * a.strips);
  TENFOLD_LAUNCH(kernel, blocks, kSumThreads, stream, a);
}

// out[slot] (+)= the parts of its position, one after another; 0 for a slot of nobody.
struct SlotDotsArgs {
  const int* inverse;
  int64_t slots, parts;
  const float* dots;  // [parts][slots]
  bool add;
  float* out;
};

constexpr int kSlotDotsThreads = 128;

static __global__ void __launch_bounds__(kSlotDotsThreads) slot_dots_kernel(SlotDotsArgs a) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kSlotDotsThreads + threadIdx.x;
  if (slot >= a.slots) return;
  const int64_t at = a.inverse[slot];
  float sum = a.add ? a.out[slot] : 0.0f;
  if (at >= 0)
    for (int64_t i = 0; i < a.parts; ++i) sum += a.dots[i * a.slots + at];
  a.out[slot] = sum;
}

inline void launch_slot_dots(const SlotDotsArgs& a, cudaStream_t stream) {
  if (a.slots == 0) return;
  const auto blocks = static_cast<unsigned>((a.slots + kSlotDotsThreads - 1) / kSlotDotsThreads);
  TENFOLD_LAUNCH(slot_dots_kernel, blocks, kSlotDotsThreads, stream, a);
}

}  // namespace tenfold::cuda
