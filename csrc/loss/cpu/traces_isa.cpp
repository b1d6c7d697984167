// SPDX-License-Identifier: Apache-2.0
// See loss/traces.h. Special tokens are few: 64 tokens at a time are compared with all of them, and
// what lies between is filled.
#include "core/cpu/vec.h"
#include "loss/traces.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kBlock = 64, kMost = 8;

// Up to kMost ids that an Int can hold, each in all lanes; of int64 as pairs of words.
struct Wanted {
  VI of[kMost];
  int count = 0;

  template <class Int>
  Wanted(const int64_t* ids, int64_t n, const Int*) {
    for (int64_t i = 0; i < n; ++i) {
      if (static_cast<Int>(ids[i]) != ids[i]) continue;
      uint32_t words[kWidth];
      for (int k = 0; k < kWidth; ++k)
        words[k] = static_cast<uint32_t>(sizeof(Int) == 8 && k % 2 != 0 ? ids[i] >> 32 : ids[i]);
      of[count++] = load(words);
    }
  }
};

// Bit k: ids[k] of 64 is wanted. An int64 is if both of its words are.
inline uint64_t found_in(const int64_t* ids, const Wanted& wanted) {
  uint64_t found = 0;
  const auto* const words = reinterpret_cast<const uint32_t*>(ids);
  for (int k = 0; k < kBlock; k += kWidth / 2) {
    const VI here = load(words + 2 * k);
    uint32_t hits = 0;
    for (int i = 0; i < wanted.count; ++i) {
      const uint32_t same = bits_of(eq(here, wanted.of[i]));
      hits |= same & same >> 1;
    }
    for (hits &= 0x55555555u; hits != 0; hits &= hits - 1)
      found |= uint64_t{1} << (k + __builtin_ctz(hits) / 2);
  }
  return found;
}
inline uint64_t found_in(const int32_t* ids, const Wanted& wanted) {
  uint64_t found = 0;
  for (int k = 0; k < kBlock; k += kWidth) {
    const VI here = load(reinterpret_cast<const uint32_t*>(ids + k));
    uint32_t hits = 0;
    for (int i = 0; i < wanted.count; ++i) hits |= bits_of(eq(here, wanted.of[i]));
    found |= static_cast<uint64_t>(hits) << k;
  }
  return found;
}

// State of a trace from block to block.
struct Trace {
  const TraceIds& special;
  const Wanted& wanted;
  uint8_t kind = kTool;

  // 64 tokens.
  template <class Int>
  inline void block(const Int* ids, const uint8_t* mask, uint8_t* out) {
    const uint64_t there = bits_of_bytes(mask);
    uint64_t found = there != 0 && kind != kIgnore ? found_in(ids, wanted) & there : 0;
    uint8_t kinds[kBlock],
        marks[kBlock];  // of their own: the compiler knows that they do not overlap
    __builtin_memcpy(marks, mask, kBlock);
    __builtin_memset(kinds, kind, kBlock);
    for (; found != 0; found &= found - 1) {
      const int at = __builtin_ctzll(found);
      const uint8_t after = class_after(special, ids[at]), mine = class_of(kind, after);
      kind = after;
      for (int k = 0; k < kBlock; ++k) kinds[k] = k < at ? kinds[k] : kind;
      kinds[at] = mine;
      if (kind == kIgnore) break;
    }
    for (int k = 0; k < kBlock; ++k) kinds[k] = marks[k] != 0 ? kinds[k] : static_cast<uint8_t>(0);
    __builtin_memcpy(out, kinds, kBlock);
  }
};

// The last tokens, fewer than 64, go by way of copies.
template <class Int>
void classes(const Int* ids, const uint8_t* mask, int64_t n, const TraceIds& special,
             uint8_t* out) {
  const int64_t all[] = {special.tool, special.obs, special.work, special.eos};
  int64_t there[4], count = 0;
  for (const int64_t id : all)
    if (id >= 0) there[count++] = id;
  const Wanted wanted(there, count, ids);
  Trace trace{special, wanted};
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock) trace.block(ids + j, mask + j, out + j);
  if (j == n) return;
  const auto left = static_cast<uint64_t>(n - j);
  Int last[kBlock] = {};
  uint8_t marks[kBlock] = {}, made[kBlock];
  __builtin_memcpy(last, ids + j, left * sizeof(Int));
  __builtin_memcpy(marks, mask + j, left);
  trace.block(last, marks, made);
  __builtin_memcpy(out + j, made, left);
}

template <class Int>
int64_t first_of(const Int* ids, int64_t n, const int64_t* stops, int64_t count) {
  int64_t found = n;
  for (int64_t s = 0; s < count; s += kMost) {
    const Wanted wanted(stops + s, count - s < kMost ? count - s : kMost, ids);
    int64_t j = 0;
    uint64_t bits = 0;
    for (; bits == 0 && j + kBlock <= found; j += kBlock) bits = found_in(ids + j, wanted);
    if (bits != 0) {
      found = j - kBlock + __builtin_ctzll(bits);
      continue;
    }
    for (; j < found; ++j)
      for (int64_t i = s; i < count && i < s + kMost; ++i)
        if (ids[j] == stops[i] && j < found) found = j;
  }
  return found;
}

}  // namespace

void trace_classes(const void* ids, bool wide, const uint8_t* mask, int64_t n,
                   const TraceIds& special, uint8_t* out) {
  if (wide) return classes(static_cast<const int64_t*>(ids), mask, n, special, out);
  classes(static_cast<const int32_t*>(ids), mask, n, special, out);
}

void masked_bytes(const uint8_t* mask, int64_t n, uint8_t value, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = mask[i] != 0 ? value : static_cast<uint8_t>(0);
}

bool weights_of_classes(const uint8_t* cls, int64_t n, float beta, float omega, bool answer,
                        float* out) {
  float table[32] = {};
  for (int k = 0; k < kTraceClasses; ++k)
    table[k] = class_weight(static_cast<uint8_t>(k), beta, omega, answer);
  const VI most = seti(kTraceClasses - 1), low = seti(31);
  bool known = true;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VI c = load_bytes(cls + i);
    known &= !any(above(c, most));
    store(out + i, lookup32(table, c & low));
  }
  for (; i < n; ++i) {
    known &= cls[i] < kTraceClasses;
    out[i] = table[cls[i] & 31];
  }
  return known;
}

int64_t find_stop(const void* ids, bool wide, int64_t n, const int64_t* stops, int64_t count) {
  if (wide) return first_of(static_cast<const int64_t*>(ids), n, stops, count);
  return first_of(static_cast<const int32_t*>(ids), n, stops, count);
}

TENFOLD_ISA_END
