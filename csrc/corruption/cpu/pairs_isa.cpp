// SPDX-License-Identifier: Apache-2.0
// See corruption/pairs.h.
#include "corruption/cpu/token_runs.h"
#include "corruption/pairs.h"

TENFOLD_ISA_BEGIN
namespace {

template <class T>
bool pack(const TokenPart* parts, int count, T eos, T pad, int64_t width, T* out) {
  TokenWriter<T> to{out, out + width};
  T signs = 0;
  for (int k = 0; k < count; ++k) {
    const auto* const from = static_cast<const T*>(parts[k].from);
    for (int64_t i = 0; i < parts[k].n; ++i) signs |= from[i];
    to.copy(from, parts[k].n, parts[k].readable);
  }
  to.put(eos);
  to.pad(pad);
  return signs >= 0;
}

template <class T>
void shift(const T* labels, int64_t n, T start, T pad, T ignore, T* out) {
  if (n == 0) return;
  out[0] = start;
  for (int64_t i = 1; i < n; ++i) out[i] = labels[i - 1] == ignore ? pad : labels[i - 1];
}

}  // namespace

bool pack_row(const TokenPart* parts, int count, bool wide, int64_t eos, int64_t pad, int64_t width,
              void* out) {
  if (wide) return pack(parts, count, eos, pad, width, static_cast<int64_t*>(out));
  return pack(parts, count, static_cast<int32_t>(eos), static_cast<int32_t>(pad), width,
              static_cast<int32_t*>(out));
}

void shift_row(const void* labels, bool wide, int64_t n, int64_t start, int64_t pad, int64_t ignore,
               void* out) {
  if (wide)
    return shift(static_cast<const int64_t*>(labels), n, start, pad, ignore,
                 static_cast<int64_t*>(out));
  shift(static_cast<const int32_t*>(labels), n, static_cast<int32_t>(start),
        static_cast<int32_t>(pad), static_cast<int32_t>(ignore), static_cast<int32_t*>(out));
}

TENFOLD_ISA_END
