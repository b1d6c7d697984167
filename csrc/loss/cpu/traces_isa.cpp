// See loss/traces.h. Special tokens are few: 64 tokens at a time are compared with all of them, and
// what lies between is filled.
#include "core/cpu/vec.h"
#include "loss/traces.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kBlock = 64;

template <class Int, class F>
inline void mark(const Int* ids, int n, uint8_t* marks, F wanted) {
  for (int k = 0; k < n; ++k) marks[k] = wanted(ids[k]) ? 1 : 0;
}

// State of a trace from block to block.
struct Trace {
  const TraceIds& special;
  uint8_t kind = kTool;

  // n <= 64 tokens; mask and out have room for 64.
  template <class Int>
  inline void block(const Int* ids, const uint8_t* mask, int n, uint8_t* out) {
    const uint64_t there = bits_of_bytes(mask);
    uint64_t found = 0;
    if (there != 0 && kind != kIgnore) {
      const int64_t tool = special.tool, obs = special.obs, work = special.work, eos = special.eos;
      uint8_t marks[kBlock] = {};
      mark(ids, n, marks,
           [=](int64_t id) { return (id == tool) | (id == obs) | (id == work) | (id == eos); });
      found = bits_of_bytes(marks) & there;
    }
    int from = 0;
    for (; found != 0; found &= found - 1) {
      const int at = __builtin_ctzll(found);
      const uint8_t after = class_after(special, ids[at]);
      if (after == kOrdinary) continue;  // a special id that is below 0
      for (int k = from; k < at; ++k) out[k] = kind;
      out[at] = class_of(kind, after);
      kind = after, from = at + 1;
      if (kind == kIgnore) break;
    }
    for (int k = from; k < kBlock; ++k) out[k] = kind;
    for (int k = 0; k < kBlock; ++k) out[k] = mask[k] != 0 ? out[k] : static_cast<uint8_t>(0);
  }
};

template <class Int>
void classes(const Int* ids, const uint8_t* mask, int64_t n, const TraceIds& special,
             uint8_t* out) {
  Trace trace{special};
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock) trace.block(ids + j, mask + j, kBlock, out + j);
  if (j == n) return;
  uint8_t here[kBlock] = {}, last[kBlock];
  __builtin_memcpy(here, mask + j, static_cast<uint64_t>(n - j));
  trace.block(ids + j, here, static_cast<int>(n - j), last);
  __builtin_memcpy(out + j, last, static_cast<uint64_t>(n - j));
}

template <class Int>
int64_t first_of(const Int* ids, int64_t n, const int64_t* stops, int64_t count) {
  for (int64_t j = 0; j < n; j += kBlock) {
    const int here = static_cast<int>(n - j < kBlock ? n - j : kBlock);
    uint8_t marks[kBlock] = {};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t stop = stops[s];
      for (int k = 0; k < here; ++k) marks[k] |= ids[j + k] == stop ? 1 : 0;
    }
    const uint64_t found = bits_of_bytes(marks);
    if (found != 0) return j + __builtin_ctzll(found);
  }
  return n;
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

bool weights_of_classes(const uint8_t* cls, int64_t n, const ClassWeights& weights, float* out) {
  float table[32] = {};
  for (int k = 0; k < kTraceClasses; ++k) table[k] = weights.of[k];
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
