// SPDX-License-Identifier: Apache-2.0
// See corruption/spans.h: inputs and targets back to tokens. Sentinels are found without a branch
// for each token, what lies between is copied.
#include "corruption/cpu/token_runs.h"
#include "corruption/spans.h"

TENFOLD_ISA_BEGIN
namespace {

// Tokens of a side but for EOS at its end.
template <class T>
int64_t body(const T* tokens, int64_t n, int64_t eos) {
  return n > 0 && tokens[n - 1] == eos ? n - 1 : n;
}

constexpr int64_t kBlock = 64;

// Calls f(position, number) for each sentinel.
template <class T, class F>
void each_sentinel(const T* tokens, int64_t n, const RestoreRow& r, const F& f) {
  const auto lowest = static_cast<uint64_t>(r.first_sentinel - r.num_sentinels + 1);
  const auto count = static_cast<uint64_t>(r.num_sentinels);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = n - first < kBlock ? n : first + kBlock;
    int32_t at[kBlock];
    int found = 0;
    for (int64_t i = first; i < end; ++i) {
      at[found] = static_cast<int32_t>(i);
      found += static_cast<uint64_t>(static_cast<int64_t>(tokens[i])) - lowest < count ? 1 : 0;
    }
    for (int j = 0; j < found; ++j) f(int64_t{at[j]}, r.first_sentinel - tokens[at[j]]);
  }
}

template <class T>
int64_t restore(const RestoreRow& r) {
  const auto *const inputs = static_cast<const T*>(r.inputs), *const targets =
                                                                  static_cast<const T*>(r.targets);
  const int64_t in = body(inputs, r.in_len, r.eos), tgt = body(targets, r.tgt_len, r.eos);
  // spans[2 s] and spans[2 s + 1]: where the text of sentinel s begins and ends.
  int64_t current = -1;
  each_sentinel(targets, tgt, r, [&](int64_t at, int64_t s) {
    if (current >= 0) r.spans[2 * current + 1] = static_cast<int32_t>(at);
    current = r.spans[2 * s] < 0 ? s : -1;  // a second one ends a text, but has none
    if (current >= 0) r.spans[2 * s] = static_cast<int32_t>(at + 1);
  });
  if (current >= 0) r.spans[2 * current + 1] = static_cast<int32_t>(tgt);
  auto* const tokens = static_cast<T*>(r.tokens);
  TokenWriter<T> out{tokens, tokens + r.width};
  int64_t from = 0;
  each_sentinel(inputs, in, r, [&](int64_t at, int64_t s) {
    out.copy(inputs + from, at - from, r.in_readable - from);
    from = at + 1;
    const int32_t begin = r.spans[2 * s], end = r.spans[2 * s + 1];
    if (begin < 0) return;
    out.copy(targets + begin, end - begin, r.tgt_readable - begin);
    r.spans[2 * s] = r.spans[2 * s + 1] = -1;
  });
  out.copy(inputs + from, in - from, r.in_readable - from);
  const int64_t made = out.at - tokens;
  out.pad(static_cast<T>(r.pad));
  each_sentinel(targets, tgt, r,
                [&](int64_t, int64_t s) { r.spans[2 * s] = r.spans[2 * s + 1] = -1; });
  return made;
}

}  // namespace

int64_t restore_row(const RestoreRow& row) {
  return row.wide ? restore<int64_t>(row) : restore<int32_t>(row);
}

TENFOLD_ISA_END
