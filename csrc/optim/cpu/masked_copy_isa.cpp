// SPDX-License-Identifier: Apache-2.0
#include "optim/cpu/mask_runs.h"
#include "optim/masked_copy.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kGroup = 64;  // bytes that are blended at once

template <int S>
inline void copy_few(char* dst, const char* src, uint32_t bits, int n) {
  for (int i = 0; i < n; ++i)
    if (((bits >> i) & 1u) != 0) __builtin_memcpy(dst + i * S, src + i * S, S);
}

// 64 / S elements of S bytes.
template <int S>
inline void copy_group(char* dst, const char* src, uint64_t bits) {
#if defined(TENFOLD_ISA_AVX512)
  const __m512i x = _mm512_loadu_si512(src);
  if constexpr (S == 1) _mm512_mask_storeu_epi8(dst, bits, x);
  if constexpr (S == 2) _mm512_mask_storeu_epi16(dst, static_cast<__mmask32>(bits), x);
  if constexpr (S == 4) _mm512_mask_storeu_epi32(dst, static_cast<__mmask16>(bits), x);
  if constexpr (S == 8) _mm512_mask_storeu_epi64(dst, static_cast<__mmask8>(bits), x);
#elif defined(TENFOLD_ISA_AVX2)
  for (int half = 0; half < 2; ++half, src += 32, dst += 32, bits >>= 32 / S) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    auto* const to = reinterpret_cast<__m256i*>(dst);
    if constexpr (S == 4) {
      const __m256i mask = _mm256_castps_si256(lanes_of(static_cast<uint32_t>(bits)).v);
      _mm256_maskstore_epi32(reinterpret_cast<int*>(dst), mask, x);
    } else if constexpr (S == 8) {
      const __m256i each = _mm256_setr_epi64x(1, 2, 4, 8);
      const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(static_cast<int64_t>(bits)), each);
      _mm256_maskstore_epi64(reinterpret_cast<long long*>(dst), _mm256_cmpeq_epi64(set, each), x);
    } else {  // no masked stores of these: the other elements are written back
      uint8_t chosen[64];
      uint64_t spread = bits;
      if constexpr (S == 2) {  // every bit twice
        spread = (bits & 0xFFFFu);
        spread = (spread | spread << 8) & 0x00FF00FFu;
        spread = (spread | spread << 4) & 0x0F0F0F0Fu;
        spread = (spread | spread << 2) & 0x33333333u;
        spread = (spread | spread << 1) & 0x55555555u;
        spread |= spread << 1;
      }
      store_bits_as_bytes(chosen, spread);
      const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chosen));
      const __m256i yes = _mm256_cmpeq_epi8(one, _mm256_set1_epi8(1));
      _mm256_storeu_si256(to, _mm256_blendv_epi8(_mm256_loadu_si256(to), x, yes));
    }
  }
#else
  for (int i = 0; i < kGroup / S; ++i)
    if (((bits >> i) & 1u) != 0) __builtin_memcpy(dst + i * S, src + i * S, S);
#endif
}

template <int S>
void copy_masked(char* dst, const char* src, const uint8_t* bits, int64_t first, int64_t last,
                 int64_t bit) {
  cut_masked<kGroup / S>(
      bits, first, last, bit,
      [&](int64_t i, uint64_t word) { copy_group<S>(dst + i * S, src + i * S, word); },
      [&](int64_t i, uint32_t word, int n) { copy_few<S>(dst + i * S, src + i * S, word, n); });
}

constexpr int64_t kLeastStreamed = 4096;  // bytes

void copy_dense(char* dst, const char* src, int64_t bytes, bool past_caches) {
  if (!past_caches || bytes < kLeastStreamed) {
    __builtin_memcpy(dst, src, static_cast<uint64_t>(bytes));
    return;
  }
  const auto head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(dst) & 63u);
  __builtin_memcpy(dst, src, static_cast<uint64_t>(head));
  constexpr int64_t kStep = 4 * kWidth;
  int64_t i = head;
  for (; i + kStep <= bytes; i += kStep)
    stream(reinterpret_cast<float*>(dst + i), load(reinterpret_cast<const float*>(src + i)));
  stream_fence();
  __builtin_memcpy(dst + i, src + i, static_cast<uint64_t>(bytes - i));
}

template <int S>
void copy_bits(char* dst, const char* src, const Mask& mask, int64_t begin, int64_t end,
               bool past_caches) {
  visit_trained(
      mask, begin, end,
      [&](int64_t first, int64_t last) {
        copy_dense(dst + first * S, src + first * S, (last - first) * S, past_caches);
      },
      [&](int64_t first, int64_t last, int64_t bit) {
        copy_masked<S>(dst, src, mask.bits, first, last, bit);
      });
}

template <class To, class From>
void round_dense(To* dst, const From* src, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(dst + i, load(src + i));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(dst + i, load_n(src + i, left), left);
  }
}

template <class To, class From>
void copy_rounded(To* dst, const From* src, const Mask& mask, int64_t begin, int64_t end) {
  constexpr int64_t kStrip = 512;  // rounded elements that are chosen from, in L1
  visit_trained(
      mask, begin, end,
      [&](int64_t first, int64_t last) { round_dense(dst + first, src + first, last - first); },
      [&](int64_t first, int64_t last, int64_t bit) {
        To strip[kStrip];
        for (int64_t i = first; i < last; i += kStrip) {
          const int64_t n = last - i < kStrip ? last - i : kStrip;
          round_dense(strip, src + i, n);
          copy_masked<sizeof(To)>(reinterpret_cast<char*>(dst + i), reinterpret_cast<char*>(strip),
                                  mask.bits, 0, n, bit + (i - first));
        }
      });
}

template <class To>
void copy_rounded_to(To* dst, const void* src, Dtype from, const Mask& mask, int64_t begin,
                     int64_t end) {
  if (from == Dtype::f32)
    return copy_rounded(dst, static_cast<const float*>(src), mask, begin, end);
  if (from == Dtype::bf16)
    return copy_rounded(dst, static_cast<const bf16_t*>(src), mask, begin, end);
  copy_rounded(dst, static_cast<const fp16_t*>(src), mask, begin, end);
}

}  // namespace

void masked_copy_bits(void* dst, const void* src, int64_t size, const Mask& mask, int64_t begin,
                      int64_t end, bool stream) {
  auto* const to = static_cast<char*>(dst);
  const auto* const from = static_cast<const char*>(src);
  if (size == 1) return copy_bits<1>(to, from, mask, begin, end, stream);
  if (size == 2) return copy_bits<2>(to, from, mask, begin, end, stream);
  if (size == 4) return copy_bits<4>(to, from, mask, begin, end, stream);
  copy_bits<8>(to, from, mask, begin, end, stream);
}

void masked_copy_rounded(void* dst, Dtype to, const void* src, Dtype from, const Mask& mask,
                         int64_t begin, int64_t end) {
  if (to == Dtype::f32)
    return copy_rounded_to(static_cast<float*>(dst), src, from, mask, begin, end);
  if (to == Dtype::bf16)
    return copy_rounded_to(static_cast<bf16_t*>(dst), src, from, mask, begin, end);
  copy_rounded_to(static_cast<fp16_t*>(dst), src, from, mask, begin, end);
}

TENFOLD_ISA_END
