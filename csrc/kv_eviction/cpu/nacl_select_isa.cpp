// Vector part of nacl_select: sortable keys of the scores and of the noisy draw, and the passes
// over them.
#include "core/cpu/math.h"
#include "kv_eviction/nacl_select.h"

TENFOLD_ISA_BEGIN
namespace {

// One window, clipped to [0, n); the order of operations is the vector code's.
float pool_one(const float* scores, int64_t n, int64_t i, int64_t half, bool use_max) {
  const int64_t lo = i - half > 0 ? i - half : 0, hi = i + half + 1 < n ? i + half + 1 : n;
  float r = scores[lo];
  for (int64_t j = lo + 1; j < hi; ++j) {
    const float x = scores[j];
    r = !use_max ? r + x : x > r || x != x ? x : r;
  }
  return r;
}

inline VF keep_nan_max(VF r, VF x) {
  return select(unordered(r), r, vmax(r, x));  // vmax gives x if either is NaN
}

// Random words first, keys after, a block at a time: both are long chains of dependent operations,
// and with one loop around both, too few of them fit into the out-of-order window (measured: 1.4
// times as long).
constexpr int64_t kDrawBlock = 512;

template <bool kLog, bool kScale>
void draw_all(const NaclSelectParams& p, const float* scores, int64_t n, uint32_t first_token,
              uint32_t head, uint32_t row_id, const uint32_t* keys, uint32_t* draw) {
  const VI zero = seti(0);
  const VF tau = set1(p.tau);
  const auto make = [&](VI word, VF score, VI key) {
    VF logit = kLog ? det_log(score) : score;
    if constexpr (kScale) logit = logit / tau;
    return select(eq(key, zero), zero, sortable_key(logit + gumbel(word)));
  };
  uint32_t words[kDrawBlock];
  for (int64_t begin = 0; begin < n; begin += kDrawBlock) {
    const int64_t count = n - begin < kDrawBlock ? n - begin : kDrawBlock;
    for (int64_t i = 0; i < count; i += kWidth) {
      const VI token = seti(first_token + static_cast<uint32_t>(begin + i)) + iota();
      store(words + i, philox_word0(p.layer, head, token, row_id, p.seed_lo, p.seed_hi));
    }
    const float* score = scores + begin;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
      store(draw + begin + i, make(load(words + i), load(score + i), load(keys + begin + i)));
    if (i < count) {
      const int left = static_cast<int>(count - i);
      store_n(draw + begin + i,
              make(load(words + i), load_n(score + i, left), load_n(keys + begin + i, left)), left);
    }
  }
}

// Scores share their upper bits: increments of one counter wait for each other, of four they do
// not.
constexpr int kCopies = 4;

// The keys that agree with `prefix` from bit kBit on, to out (which may be where they are); how
// many.
template <int kBit>
int64_t collect(const uint32_t* keys, int64_t n, uint32_t prefix, uint32_t* out) {
  const uint32_t* const begin = out;
  const VI wanted = seti(prefix >> kBit);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VI key = load(keys + i);
    out += store_chosen(out, eq(shr<kBit>(key), wanted), key);
  }
  for (; i < n; ++i)
    if (keys[i] >> kBit == prefix >> kBit) *out++ = keys[i];
  return out - begin;
}

}  // namespace

void nacl_pool(const float* scores, int64_t n, int32_t kernel, bool use_max, float* out) {
  const int64_t half = kernel / 2;
  const float width = static_cast<float>(kernel);
  const auto edge = [&](int64_t i) {
    const float r = pool_one(scores, n, i, half, use_max);
    out[i] = use_max ? r : r / width;
  };
  int64_t i = 0;
  for (; i < half && i < n; ++i) edge(i);
  for (; i + kWidth + half <= n; i += kWidth) {
    VF r = load(scores + i - half);
    if (use_max) {
      for (int64_t j = 1 - half; j <= half; ++j) r = keep_nan_max(r, load(scores + i + j));
    } else {
      for (int64_t j = 1 - half; j <= half; ++j) r = r + load(scores + i + j);
      r = r / set1(width);
    }
    store(out + i, r);
  }
  for (; i < n; ++i) edge(i);
}

void nacl_topk_keys(const float* scores, int64_t n, uint32_t* keys) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(keys + i, sortable_key(load(scores + i)));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_n(keys + i, sortable_key(load_n(scores + i, left)), left);
  }
}

void nacl_draw_keys(const NaclSelectParams& p, const float* scores, int64_t n, uint32_t first_token,
                    uint32_t head, uint32_t row_id, const uint32_t* keys, uint32_t* draw) {
  const auto run = p.log_score ? (p.tau == 1.0f ? draw_all<true, false> : draw_all<true, true>)
                               : (p.tau == 1.0f ? draw_all<false, false> : draw_all<false, true>);
  run(p, scores, n, first_token, head, row_id, keys, draw);
}

// Largest-first radix selection: 11 + 11 + 10 bits. After the first digit only the keys of the
// boundary bin are looked at again, so the cost is one counting pass over `keys`.
NaclCut nacl_cut(const uint32_t* keys, int64_t n, int64_t wanted, uint32_t* boundary) {
  constexpr int kShift[3] = {21, 10, 0};
  constexpr uint32_t kBins[3] = {2048, 2048, 1024};
  uint32_t bins[kCopies][2048] = {};
  int64_t i = 0, left = 0;
  for (; i + kCopies <= n; i += kCopies)
    for (int c = 0; c < kCopies; ++c) ++bins[c][keys[i + c] >> 21];
  for (; i < n; ++i) ++bins[0][keys[i] >> 21];
  for (int bin = 0; bin < 2048; ++bin) bins[0][bin] += bins[1][bin] + bins[2][bin] + bins[3][bin];
  uint32_t prefix = 0;
  for (int digit = 0; digit < 3; ++digit) {
    uint32_t bin = kBins[digit] - 1;
    while (bins[0][bin] < static_cast<uint64_t>(wanted)) wanted -= bins[0][bin--];
    prefix |= bin << kShift[digit];
    if (digit == 2) break;
    left = digit == 0 ? collect<21>(keys, n, prefix, boundary)
                      : collect<10>(boundary, left, prefix, boundary);
    for (uint32_t& count : bins[0]) count = 0;
    const int shift = kShift[digit + 1];
    const uint32_t mask = kBins[digit + 1] - 1;
    for (int64_t j = 0; j < left; ++j) ++bins[0][(boundary[j] >> shift) & mask];
  }
  return {prefix, wanted};
}

void nacl_take(const uint32_t* by, int64_t n, NaclCut cut, uint32_t* keys) {
  const VI limit = seti(cut.key), zero = seti(0);
  const auto one = [&](int64_t i) {
    if (by[i] > cut.key || (by[i] == cut.key && cut.ties-- > 0)) keys[i] = 0;
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VI key = load(by + i);
    if (any(eq(key, limit))) {
      for (int64_t j = i; j < i + kWidth; ++j) one(j);
    } else {
      store(keys + i, select(above(key, limit), zero, load(keys + i)));
    }
  }
  for (; i < n; ++i) one(i);
}

int64_t nacl_emit(const uint32_t* keys, int64_t n, uint32_t first, uint32_t* out) {
  const uint32_t* const begin = out;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VI slot = seti(first + static_cast<uint32_t>(i)) + iota();
    out += store_chosen(out, eq(load(keys + i), seti(0)), slot);
  }
  for (; i < n; ++i)
    if (keys[i] == 0) *out++ = first + static_cast<uint32_t>(i);
  return out - begin;
}

TENFOLD_ISA_END
