// SPDX-License-Identifier: Apache-2.0
// Vector part of nacl_select. Both choices prune: a sample gives a limit that is most likely below
// the cut, only candidates that can reach it go on a list, and the cut is found there. The list
// held every winner if its cut is at or above the limit; if not, the choice is repeated with all.
#include <cstring>
#include <type_traits>

#include "kv_eviction/cpu/nacl_select_cut.h"
#include "kv_eviction/cpu/nacl_select_draw.h"

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

// The scores from `limit` on, as keys, in order; how many.
int64_t list_scores(const float* scores, int64_t n, float limit, uint32_t* keys) {
  const VF least = set1(limit);
  int64_t count = 0, i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VF score = nan_to_lowest(load(scores + i));
    count += store_chosen(keys + count, ge(score, least), bits(score));
  }
  for (; i < n; ++i) {
    const float score = scores[i] != scores[i] ? -kInf : scores[i];
    if (score >= limit) keys[count++] = float_to_bits(score);
  }
  for (i = 0; i < count; i += kWidth)  // past the end too: the buffer has room
    store(keys + i, sortable_key(from_bits(load(keys + i))));
  return count;
}

Cut topk_cut(const float* scores, int64_t n, int64_t topk, const NaclBuffers& buf) {
  if (n >= kLeastSampled) {
    const int64_t size = sample_size(n);
    for (int64_t j = 0; j < size; j += kWidth)
      store(buf.keys + j, sortable_key(gather(scores, sample_at(j, n))));
    const uint32_t limit = guess_cut(buf.keys, size, topk, n, buf.boundary);
    if (limit != 0) {
      const int64_t count = list_scores(scores, n, from_sortable_key(limit), buf.keys);
      if (count >= topk) return cut_of(buf.keys, count, topk, buf.boundary);
    }
  }
  return cut_of(buf.keys, list_scores(scores, n, -kInf, buf.keys), topk, buf.boundary);
}

// Random words of a block first, what is made of them after: both are long chains of dependent
// operations, and with one loop around both, too few of them fit into the out-of-order window
// (measured: 1.4 times as long).
constexpr int64_t kDrawBlock = 512;

template <bool kLog, bool kScale>
class Draws {
 public:
  Draws(const NaclSelectParams& p, const NaclDraw& draw, const float* scores, int64_t n,
        const NaclBuffers& buf)
      : noise_(p.tau), p_(p), draw_(draw), scores_(scores), n_(n), buf_(buf) {}

  void choose() const {
    int64_t count = 0;
    const uint32_t limit = n_ >= kLeastSampled ? guess() : 0;
    if (limit != 0) count = list(from_sortable_key(limit));
    if (count >= draw_.wanted) {
      const Cut cut = cut_of(buf_.keys, count, draw_.wanted, buf_.boundary);
      if (cut.key >= limit) return mark(count, cut);
    }
    count = list(-kInf);
    mark(count, cut_of(buf_.keys, count, draw_.wanted, buf_.boundary));
  }

 private:
  VI words(VI at) const {
    return philox_word0(p_.layer, draw_.head, seti(draw_.first_token) + at, draw_.row_id,
                        p_.seed_lo, p_.seed_hi);
  }

  uint32_t guess() const {
    const int64_t size = sample_size(n_);
    const VF top = set1(draw_.top);
    for (int64_t j = 0; j < size; j += kWidth) store(buf_.keys + j, words(sample_at(j, n_)));
    for (int64_t j = 0; j < size; j += kWidth) {
      const VF score = gather(scores_, sample_at(j, n_));
      const VI key = sortable_key(noise_.key(score, load(buf_.keys + j)));
      store(buf_.keys + j, select(gt(score, top), seti(0), key));
    }
    return guess_cut(buf_.keys, size, draw_.wanted, draw_.left, buf_.boundary);
  }

  // Positions and keys of the candidates whose bound reaches the limit; how many.
  int64_t list(float limit) const {
    const VF least = set1(limit);
    const VI zero = seti(0);
    uint32_t block[kDrawBlock];
    int64_t count = 0;
    for (int64_t begin = 0; begin < n_; begin += kDrawBlock) {
      const int64_t end = n_ - begin < kDrawBlock ? n_ : begin + kDrawBlock;
      for (int64_t i = begin; i < end; i += kWidth)
        store(block + (i - begin), words(seti(static_cast<uint32_t>(i)) + iota()));
      for (int64_t i = begin; i < end; i += kWidth) {
        const VF score =
            end - i < kWidth ? load_n(scores_ + i, static_cast<int>(end - i)) : load(scores_ + i);
        const VI word = load(block + (i - begin));
        const VM open =
            both(eq(load_bytes(buf_.chosen + i), zero), ge(noise_.bound(score, word), least));
        store_chosen(buf_.at + count, open, seti(static_cast<uint32_t>(i)) + iota());
        count += store_chosen(buf_.keys + count, open, word);
      }
    }
    pad_list(count);
    make_keys(count);
    return count;
  }

  // Whole vectors are read: what is past the end must be a position too.
  void pad_list(int64_t count) const { store(buf_.at + count, seti(0)); }

  // Words to keys.
  void make_keys(int64_t count) const {
    for (int64_t i = 0; i < count; i += kWidth) {
      const VF score = gather(scores_, load(buf_.at + i));
      store(buf_.keys + i, sortable_key(noise_.key(score, load(buf_.keys + i))));
    }
  }

  void mark(int64_t count, Cut cut) const {
    for (int64_t i = 0; i < count; ++i) {
      bool taken = buf_.keys[i] > cut.key;
      if (buf_.keys[i] == cut.key) taken = cut.ties-- > 0;
      buf_.chosen[buf_.at[i]] = taken ? 1 : 0;
    }
  }

  Noise<kLog, kScale> noise_;
  const NaclSelectParams& p_;
  const NaclDraw& draw_;
  const float* scores_;
  int64_t n_;
  const NaclBuffers& buf_;
};

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

float nacl_choose_topk(const float* scores, int64_t n, int64_t topk, const NaclBuffers& buf) {
  memset(buf.chosen, 0, n);
  memset(buf.chosen + n, 1, kNaclSlack);  // what is not a candidate is not drawn
  if (topk == 0) return kInf;
  Cut cut = topk_cut(scores, n, topk, buf);
  const float limit = from_sortable_key(cut.key);
  const VF key = set1(limit);
  const auto one = [&](int64_t i) {
    const float score = scores[i] != scores[i] ? -kInf : scores[i];
    buf.chosen[i] = score > limit || (score == limit && cut.ties-- > 0) ? 1 : 0;
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VF score = nan_to_lowest(load(scores + i));
    if (cut.ties > 0 && any(eq(score, key))) {
      for (int64_t j = i; j < i + kWidth; ++j) one(j);
    } else {
      store_bytes(buf.chosen + i, gt(score, key));
    }
  }
  for (; i < n; ++i) one(i);
  return limit;
}

void nacl_choose_draws(const NaclSelectParams& p, const NaclDraw& draw, const float* scores,
                       int64_t n, const NaclBuffers& buf) {
  const auto run = [&](auto log, auto scale) {
    Draws<decltype(log)::value, decltype(scale)::value>(p, draw, scores, n, buf).choose();
  };
  if (p.log_score) {
    p.tau == 1.0f ? run(std::true_type(), std::false_type())
                  : run(std::true_type(), std::true_type());
  } else {
    p.tau == 1.0f ? run(std::false_type(), std::false_type())
                  : run(std::false_type(), std::true_type());
  }
}

int64_t nacl_emit(int64_t n, int64_t first, const NaclBuffers& buf, int64_t* out) {
  uint32_t* at = buf.at;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VM chosen = above(load_bytes(buf.chosen + i), seti(0));
    at += store_chosen(at, chosen, seti(static_cast<uint32_t>(i)) + iota());
  }
  for (; i < n; ++i)
    if (buf.chosen[i] != 0) *at++ = static_cast<uint32_t>(i);
  const int64_t count = at - buf.at;
  for (i = 0; i < count; ++i) out[i] = first + buf.at[i];
  return count;
}

TENFOLD_ISA_END
