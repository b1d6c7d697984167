// SPDX-License-Identifier: Apache-2.0
// Device code of masked_adamw_8bit_: a warp takes a state block of 256 elements, a lane 8
// neighbours. Both code books lie in shared memory, with a coarse table of where in them a
// magnitude belongs: the search for the nearest code then takes a few steps instead of eight.
#pragma once

#include "optim/cuda/adamw_table.cuh"

namespace tenfold::cuda {

constexpr int kLaneElements = static_cast<int>(kStateBlock) / 32;
constexpr int64_t kAdamw8Chunk = 8 * kAdamwThreads * kLaneElements;  // 64 state blocks

// Buckets of the coarse table: a sign, an exponent and 4 mantissa bits each; 0: |x| < 2^-24.
constexpr int kCoarseShift = 19;
constexpr int kCoarseSmallest = (127 - 24) << (23 - kCoarseShift);
constexpr int kCoarse = (127 << (23 - kCoarseShift)) - kCoarseSmallest + 1;

struct DeviceBook {
  float code[kCodes];
  float cut[kCodes];                // see CodeBook
  uint16_t range[2 * kCoarse + 1];  // first code << 8 | last code of a bucket
};

// The largest float32 that is not above (a + b) / 2.
TENFOLD_HD float cut_between(float a, float b) {
  const double middle = (static_cast<double>(a) + static_cast<double>(b)) * 0.5;
  const auto cut = static_cast<float>(middle);
  return static_cast<double>(cut) > middle ? nextafterf(cut, -INFINITY) : cut;
}

// The number of cuts below x, known to be in [low, high].
__device__ inline int count_cuts(const float* cut, float x, int low, int high) {
  while (low < high) {
    const int middle = (low + high) / 2;
    if (x > cut[middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// All threads of the block; the caller puts a barrier after it.
__device__ inline void make_book(const float* code, DeviceBook* book) {
  for (int j = static_cast<int>(threadIdx.x); j < kCodes; j += kAdamwThreads) {
    book->code[j] = code[j];
    book->cut[j] = j + 1 < kCodes ? cut_between(code[j], code[j + 1]) : INFINITY;
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < 2 * kCoarse + 1; b += kAdamwThreads) {
    const int side = b < kCoarse ? kCoarse - b : b - kCoarse;
    const auto upper = static_cast<uint32_t>(kCoarseSmallest + side - 1) << kCoarseShift;
    const float edge = bits_to_float(static_cast<uint32_t>(kCoarseSmallest) << kCoarseShift);
    const float inner = side == 0 ? edge : bits_to_float(upper);  // magnitudes of the bucket
    const float outer = side == 0 ? edge : bits_to_float(upper | ((1u << kCoarseShift) - 1));
    const float low = b > kCoarse ? inner : -outer, high = b < kCoarse ? -inner : outer;
    const int first = count_cuts(book->cut, low, 0, kCodes - 1);
    const int last = count_cuts(book->cut, high, first, kCodes - 1);
    book->range[b] = static_cast<uint16_t>(first << 8 | last);
  }
}

// The code nearest to x, |x| <= 1; ties to the lower one, NaN to the first.
__device__ inline int nearest_code(const DeviceBook& book, float x) {
  if (x != x) return 0;
  const uint32_t bits = float_to_bits(x);
  int side = static_cast<int>((bits & 0x7FFFFFFFu) >> kCoarseShift) - kCoarseSmallest + 1;
  side = side < 0 ? 0 : side > kCoarse ? kCoarse : side;
  const uint16_t range = book.range[kCoarse + (bits >> 31 != 0 ? -side : side)];
  int q = count_cuts(book.cut, x, range >> 8, range & 255);
  while (q > 0 && book.code[q - 1] == book.code[q]) --q;  // of equal codes the first
  return q;
}

// The largest of a warp; as bits NaN is larger than all numbers.
__device__ inline float warp_largest(uint32_t bits) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, bits, lane);
    bits = other > bits ? other : bits;
  }
  return bits_to_float(bits);
}

struct LaneMoments {
  float m[kLaneElements], v[kLaneElements];
};

__device__ inline Pack<uint8_t, kLaneElements> quantise(const DeviceBook& book, const float* x,
                                                        float absmax, uint32_t bits,
                                                        Pack<uint8_t, kLaneElements> codes) {
  for (int k = 0; k < kLaneElements; ++k) {
    if ((bits >> k & 1) == 0) continue;
    const float y = absmax == 0.0f ? 0.0f : FloatOps::div(x[k], absmax);
    codes.x[k] = static_cast<uint8_t>(nearest_code(book, y));
  }
  return codes;
}

// One state block from element i on; n of this lane's elements exist.
template <class P>
__device__ inline void update_state_block(const Adamw8Tensor& t, const AdamwScalars& s,
                                          const AdamwOptions& o, const DeviceBook& book1,
                                          const DeviceBook& book2, int64_t i, int n) {
  const uint32_t bits = n > 0 ? trained_bits(t.mask, i, n) : 0;
  if (__ballot_sync(0xFFFFFFFFu, bits != 0) == 0) return;
  const int64_t block = i / kStateBlock;
  const float old1 = t.absmax1[block], old2 = t.absmax2[block];
  auto* const p = static_cast<P*>(t.param) + i;
  auto* const codes1 = static_cast<uint8_t*>(t.exp_avg) + i;
  auto* const codes2 = static_cast<uint8_t*>(t.exp_avg_sq) + i;
  // Not kept over the loop, in registers that are few: the pointers are arguments.
  const bool whole = n == kLaneElements && aligned16(t.param) && aligned16(t.grad);
  const bool code_whole = n == kLaneElements && aligned16(t.exp_avg) && aligned16(t.exp_avg_sq);
  Pack<P, kLaneElements> param{}, grad{};
  Pack<uint8_t, kLaneElements> q1{}, q2{};
  if (bits != 0) {
    param = load_pack<P, kLaneElements>(p, n, whole);
    grad = load_pack<P, kLaneElements>(static_cast<const P*>(t.grad) + i, n, whole);
    q1 = load_pack<uint8_t, kLaneElements>(codes1, n, code_whole);
    q2 = load_pack<uint8_t, kLaneElements>(codes2, n, code_whole);
  }
  const auto c = adamw_constants<FloatOps>(s);
  const bool stochastic = o.stochastic && t.dtype == Dtype::bf16;
  Philox4 noise{};
  if (stochastic) noise = rounding_noise(o.seed, s, t.id, i);
  LaneMoments x{};
  uint32_t most1 = 0, most2 = 0;
#pragma unroll
  for (int k = 0; k < kLaneElements; ++k) {
    if ((bits >> k & 1) == 0) continue;
    float m = FloatOps::mul(book1.code[q1.x[k]], old1),
          v = FloatOps::mul(book2.code[q2.x[k]], old2);
    adamw_moments<FloatOps>(c, scaled_gradient(s, to_float(grad.x[k])), &m, &v);
    float y = adamw_param<FloatOps>(c, to_float(param.x[k]), m, v);
    if (stochastic) y = round_stochastic(y, noise.word[k >> 1] >> (16 * (k & 1)) & 0xFFFF);
    from_float(y, &param.x[k]);
    x.m[k] = m, x.v[k] = v;
    const uint32_t a = float_to_bits(m) & 0x7FFFFFFFu, b = float_to_bits(v) & 0x7FFFFFFFu;
    most1 = a > most1 ? a : most1;
    most2 = b > most2 ? b : most2;
  }
  const float new1 = warp_largest(most1), new2 = warp_largest(most2);
  __syncwarp();  // all lanes have read the old ones
  if (threadIdx.x % 32 == 0) t.absmax1[block] = new1, t.absmax2[block] = new2;
  if (bits == 0) return;
  store_pack<P, kLaneElements>(p, param, n, whole);
  store_pack(codes1, quantise(book1, x.m, new1, bits, q1), n, code_whole);
  store_pack(codes2, quantise(book2, x.v, new2, bits, q2), n, code_whole);
}

template <class P>
__global__ void __launch_bounds__(kAdamwThreads)
    masked_adamw_8bit_kernel(const __grid_constant__ AdamwTable<Adamw8Tensor> table,
                             const AdamwScalars* scalars, const AdamwOptions o, const float* code1,
                             const float* code2) {
  TENFOLD_SHARED(DeviceBook, books, 2);
  const int chunk = static_cast<int>(blockIdx.x), at = find_tensor(table, chunk);
  const Adamw8Tensor& t = table.tensor[at];
  const AdamwScalars s = scalars[table.scalars[at]];
  if (s.skips) return;
  make_book(code1, &books[0]);
  make_book(code2, &books[1]);
  __syncthreads();
  const int64_t begin = (chunk - table.first_chunk[at]) * kAdamw8Chunk;
  const int length =
      static_cast<int>(t.numel - begin < kAdamw8Chunk ? t.numel - begin : kAdamw8Chunk);
  constexpr int kBlock = static_cast<int>(kStateBlock);
  // A warp's lanes go on together, also those behind the end.
  for (int from = static_cast<int>(threadIdx.x) * kLaneElements; from / kBlock * kBlock < length;
       from += kAdamwThreads * kLaneElements) {
    const int left = length - from, n = left < 0 ? 0 : left < kLaneElements ? left : kLaneElements;
    update_state_block<P>(t, s, o, books[0], books[1], begin + from, n);
  }
}

// `tensors`: all of one parameter dtype; `at`: their places in the scalars.
template <class P>
void launch_masked_adamw_8bit(const Adamw8Tensor* const* tensors, const int* at, int64_t count,
                              const AdamwOptions& o, const AdamwScalars* scalars,
                              const float* code1, const float* code2, cudaStream_t stream) {
  for_each_table(tensors, at, count, kAdamw8Chunk,
                 [&](const AdamwTable<Adamw8Tensor>& table, int64_t chunks) {
                   TENFOLD_LAUNCH(masked_adamw_8bit_kernel<P>, static_cast<unsigned>(chunks),
                                  kAdamwThreads, stream, table, scalars, o, code1, code2);
                 });
}

}  // namespace tenfold::cuda
