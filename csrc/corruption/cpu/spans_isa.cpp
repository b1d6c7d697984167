// SPDX-License-Identifier: Apache-2.0
// See corruption/spans.h. Spans are short, of about 3 and 17 tokens: they are copied in whole
// vectors, whose excess the next one writes over.
#include "core/cpu/math.h"
#include "corruption/cpu/token_runs.h"
#include "corruption/spans.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int64_t kMarks = 64;  // bytes that are looked at together

// drawn[i] of number i of k, below first + i + 1; in place of their words.
void draw_numbers(const SpanStream& s, uint32_t part, int64_t first, int64_t k, uint32_t* drawn) {
  const VI lanes = counter_lanes();
  for (int64_t i = 0; i < k; i += 4 * kWidth) {
    VI x[4] = {seti(static_cast<uint32_t>(i / 4)) + lanes, seti(part), seti(s.lo), seti(s.hi)};
    philox_rounds(x, s.seed_lo, s.seed_hi);
    store_by_four(drawn + i, x[0], x[1], x[2], x[3]);
  }
  const auto bound = static_cast<uint32_t>(first + 1);
  const auto count = static_cast<uint32_t>(k);
  uint32_t doubtful = 0;
  for (uint32_t i = 0; i < count; ++i) doubtful |= drawn[i] * (bound + i) < bound + i ? 1u : 0u;
  if (doubtful != 0) [[unlikely]] {
    for (uint32_t i = 0; i < count; ++i) drawn[i] = draw_below(s, i, part, bound + i, drawn[i]);
    return;
  }
  for (uint32_t i = 0; i < count; ++i)
    drawn[i] = static_cast<uint32_t>(static_cast<uint64_t>(drawn[i]) * (bound + i) >> 32);
}

// Where the parts end that `total` tokens are cut into, at gaps that are drawn.
void draw_cuts(const SpanStream& s, uint32_t part, int64_t total, int64_t parts,
               const SpanBuffers& buf, int32_t* cuts) {
  const int64_t k = parts - 1, gaps = total - 1, first = gaps - k;
  if (k > 0) {
    draw_numbers(s, part, first, k, buf.words);
    uint8_t* const marks = buf.marks;
    const int64_t rounded = (gaps + kMarks - 1) / kMarks * kMarks;
    __builtin_memset(marks, 0, static_cast<uint64_t>(rounded));
    for (int64_t i = 0; i < k; ++i) {
      const int64_t drawn = buf.words[i];
      marks[marks[drawn] != 0 ? first + i : drawn] = 1;
    }
    auto* to = reinterpret_cast<uint32_t*>(cuts);
    const VI after = iota() + seti(1);
    for (int64_t at = 0; at < rounded; at += kMarks) {
      const uint64_t bits = bits_of_bytes(marks + at);
      for (int64_t i = 0; i < kMarks; i += kWidth)
        to += store_chosen(to, lanes_of(static_cast<uint32_t>(bits >> i)),
                           after + seti(static_cast<uint32_t>(at + i)));
    }
  }
  cuts[k] = static_cast<int32_t>(total);
}

// Rotates spans of a row of n tokens; one may be cut in two.
int64_t roll_spans(int32_t* edges, int64_t spans, int64_t n, int64_t shift, int32_t* spare) {
  int64_t stay = 0;  // spans of which something is left in front of the end
  while (stay < spans && edges[2 * stay] + shift < n) ++stay;
  int64_t made = 0;
  const auto add = [&](int64_t begin, int64_t end) {
    spare[2 * made] = static_cast<int32_t>(begin), spare[2 * made + 1] = static_cast<int32_t>(end);
    ++made;
  };
  const bool cut = stay > 0 && edges[2 * stay - 1] + shift > n;
  if (cut) add(0, edges[2 * stay - 1] + shift - n);
  for (int64_t j = stay; j < spans; ++j)
    add(edges[2 * j] + shift - n, edges[2 * j + 1] + shift - n);
  for (int64_t j = 0; j < stay; ++j) {
    const int64_t end = edges[2 * j + 1] + shift;
    add(edges[2 * j] + shift, end < n ? end : n);
  }
  __builtin_memcpy(edges, spare, static_cast<uint64_t>(made) * 2 * sizeof(int32_t));
  return made;
}

// The runs between spans. Returns their number.
int64_t kept_runs(const int32_t* edges, int64_t spans, int64_t n, int32_t* out) {
  int64_t made = 0;
  int32_t from = 0;
  for (int64_t j = 0; j <= spans; ++j) {
    const int32_t to = j < spans ? edges[2 * j] : static_cast<int32_t>(n);
    if (to > from) out[2 * made] = from, out[2 * made + 1] = to, ++made;
    if (j < spans) from = edges[2 * j + 1];
  }
  return made;
}

// Of the tokens between spans, 17 on average: 24 or 32 of them.
template <class T>
constexpr int kKeptChunks = sizeof(T) == 8 ? 3 : 2;

// The row with each of the runs replaced by a sentinel.
template <class T>
void put_marked(const CorruptRow& r, const int32_t* runs, int64_t count, TokenWriter<T>& out) {
  const auto* const tokens = static_cast<const T*>(r.tokens);
  int64_t from = 0;
  for (int64_t j = 0; j < count; ++j) {
    out.template copy<kKeptChunks<T>>(tokens + from, runs[2 * j] - from, r.readable - from);
    out.put(static_cast<T>(r.ids.first_sentinel - j));
    from = runs[2 * j + 1];
  }
  out.copy(tokens + from, r.n - from, r.readable - from);
}

// The runs, each behind its sentinel.
template <class T>
void put_runs(const CorruptRow& r, const int32_t* runs, int64_t count, TokenWriter<T>& out) {
  const auto* const tokens = static_cast<const T*>(r.tokens);
  for (int64_t j = 0; j < count; ++j) {
    out.put(static_cast<T>(r.ids.first_sentinel - j));
    const int64_t from = runs[2 * j];
    out.copy(tokens + from, runs[2 * j + 1] - from, r.readable - from);
  }
}

template <class T>
void corrupt(const CorruptRow& r) {
  auto *const inputs = static_cast<T*>(r.inputs), *const targets = static_cast<T*>(r.targets);
  TokenWriter<T> in{inputs, inputs + r.max_inputs}, out{targets, targets + r.max_targets};
  put_marked(r, r.edges, r.spans, in);
  int64_t marks = r.spans;
  if (r.ids.aligned) {
    put_runs(r, r.edges, r.spans, out);
  } else {
    marks = kept_runs(r.edges, r.spans, r.n, r.spare);
    put_marked(r, r.spare, marks, out);
  }
  if (r.ids.final_sentinel) out.put(static_cast<T>(r.ids.first_sentinel - marks));
  in.put(static_cast<T>(r.ids.eos));
  out.put(static_cast<T>(r.ids.eos));
  in.pad(static_cast<T>(r.ids.pad));
  out.pad(static_cast<T>(r.ids.target_pad));
}

template <class T, class U>
bool all_raw(const T* tokens, int64_t n, U lowest, U sentinels) {
  U signs = 0, nearest = ~U{0};
  for (int64_t i = 0; i < n; ++i) {
    const auto token = static_cast<U>(tokens[i]), above = static_cast<U>(token - lowest);
    signs |= token;
    nearest = above < nearest ? above : nearest;
  }
  return static_cast<T>(signs) >= 0 && (sentinels == 0 || nearest >= sentinels);
}

}  // namespace

int64_t draw_spans(const SpanRule& rule, const SpanStream& stream, bool roll, int64_t n,
                   const SpanBuffers& buf) {
  const SpanCounts c = span_counts(rule, n);
  if (c.spans == 0) return 0;
  draw_cuts(stream, kNoiseGaps, c.noise, c.spans, buf, buf.noise_cuts);
  draw_cuts(stream, kKeptGaps, n - c.noise, c.spans, buf, buf.kept_cuts);
  int32_t before = 0;
  for (int64_t j = 0; j < c.spans; ++j) {
    const int32_t kept = buf.kept_cuts[j], noise = buf.noise_cuts[j];
    buf.edges[2 * j] = kept + before, buf.edges[2 * j + 1] = kept + noise;
    before = noise;
  }
  return roll ? roll_spans(buf.edges, c.spans, n, draw_roll(stream, n), buf.spare) : c.spans;
}

int64_t find_spans(const uint8_t* mask, int64_t n, int32_t* edges) {
  int64_t found = 0;
  uint64_t before = 0;  // whether the token before is masked
  for (int64_t at = 0; at < n; at += kMarks) {
    uint64_t bits;
    if (n - at >= kMarks) {
      bits = bits_of_bytes(mask + at);
    } else {
      uint8_t rest[kMarks] = {};
      __builtin_memcpy(rest, mask + at, static_cast<uint64_t>(n - at));
      bits = bits_of_bytes(rest);
    }
    uint64_t edge = bits ^ (bits << 1 | before);
    before = bits >> 63;
    for (; edge != 0; edge &= edge - 1) {
      const int64_t where = at + __builtin_ctzll(edge);
      edges[found++] = static_cast<int32_t>(where);
    }
  }
  if (found % 2 != 0) edges[found++] = static_cast<int32_t>(n);
  return found / 2;
}

void write_mask(const int32_t* edges, int64_t spans, int64_t width, uint8_t* mask) {
  uint8_t *at = mask, *const end = mask + width;
  const auto fill = [&](int64_t n, uint8_t value) {
    if (n <= kMarks && end - at >= kMarks) [[likely]] {
      __builtin_memset(at, value, kMarks);  // what is too much is written over
    } else {
      __builtin_memset(at, value, static_cast<uint64_t>(n));
    }
    at += n;
  };
  for (int64_t j = 0; j < spans; ++j) {
    fill(edges[2 * j] - (at - mask), 0);
    fill(edges[2 * j + 1] - edges[2 * j], 1);
  }
  __builtin_memset(at, 0, static_cast<uint64_t>(end - at));
}

void corrupt_row(const CorruptRow& row) {
  row.wide ? corrupt<int64_t>(row) : corrupt<int32_t>(row);
}

bool raw_tokens(const void* tokens, bool wide, int64_t n, int64_t lowest, int64_t sentinels) {
  if (wide)
    return all_raw(static_cast<const int64_t*>(tokens), n, static_cast<uint64_t>(lowest),
                   static_cast<uint64_t>(sentinels));
  return all_raw(static_cast<const int32_t*>(tokens), n, static_cast<uint32_t>(lowest),
                 static_cast<uint32_t>(sentinels));
}

TENFOLD_ISA_END
