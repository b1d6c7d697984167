// SPDX-License-Identifier: Apache-2.0
// See influence/markov.h. A few vectors of lanes go through all steps of a run; what a step needs
// besides its batch's factors is in registers or was written a step ago.
#include "influence/cpu/lanes.h"

TENFOLD_ISA_BEGIN
namespace {

template <class T, int kCount>
struct Block {
  using R = Real<T>;
  using L = Lanes<T, kCount>;

  const MarkovSteps<T>& s;
  int64_t at;  // first lane
  int tail;

  int lanes() const { return L::count(tail); }
  const int32_t* ids_of(int64_t run, int64_t t) const {
    return s.ids + (run * s.steps + t) * s.batch;
  }
  int64_t length(int64_t run) const { return s.lengths != nullptr ? s.lengths[run] : s.steps; }

  // alpha of lag plane + 1, or beta.
  [[gnu::always_inline]] L factor(int64_t plane, const int32_t* ids, R weight) const {
    L sum = sum_rows<T, kCount>(s.factors + plane * s.plane + at, s.row, ids, s.batch, tail);
    if (s.mean) sum = sum * L::all(weight);
    if (plane == 0 && s.residual) sum = sum + L::all(R{1});
    return sum;
  }

  // y at step t of a run, or before it; null: zeros.
  const R* past(int64_t run, int64_t t) const {
    if (t >= 0) return s.y + run * s.y_run + t * s.y_step + at;
    return s.y0 != nullptr ? s.y0 + run * s.y0_run + (s.lags + t) * s.y0_lag + at : nullptr;
  }
  const uint8_t* mask(int64_t run, int64_t t) const {
    return s.mask != nullptr && t >= 0 ? s.mask + run * s.mask_run + t * s.mask_step + at : nullptr;
  }
  // The same with 0 for what was not recorded.
  [[gnu::always_inline]] L known_past(int64_t run, int64_t t) const {
    const R* const from = past(run, t);
    if (from == nullptr) return L::all(R{0});
    const uint8_t* const there = mask(run, t);
    if (there == nullptr) return L::read(from, tail);
    R known[L::kLanes] = {};
    for (int k = 0; k < lanes(); ++k) known[k] = there[k] != 0 ? from[k] : R{0};
    return L::read(known, kWidth);
  }
  // Zeros in the lanes of x of which a lag of step t was not recorded.
  void drop_unknown(int64_t run, int64_t t, L* x) const {
    R kept[L::kLanes] = {};
    x->write(kept, kWidth);
    for (int64_t lag = 1; lag <= s.lags && lag <= t; ++lag) {
      const uint8_t* const there = mask(run, t - lag);
      for (int k = 0; k < lanes(); ++k) kept[k] = there[k] != 0 ? kept[k] : R{0};
    }
    *x = L::read(kept, kWidth);
  }
};

// Steps by which rows of runs are asked for before they are used: they lie a row of all lanes
// apart, which the hardware does not foresee.
constexpr int64_t kAhead = 8;

// `lanes` numbers from p on.
template <int kWrite, class R>
[[gnu::always_inline]] inline void fetch(const R* p, int64_t lanes) {
  const auto* const bytes = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < lanes * static_cast<int64_t>(sizeof(R)); i += 64)
    __builtin_prefetch(bytes + i, kWrite, 3);
}

template <class T, int kCount>
void forward(const MarkovForward<T>& p, int64_t run, int64_t at, int tail) {
  using B = Block<T, kCount>;
  const MarkovSteps<T>& s = p.s;
  const B block{s, at, tail};
  const int64_t length = block.length(run);
  Real<T>* out = p.out + run * s.steps * s.tests + at;
  typename B::L last = block.known_past(run, -1);
  for (int64_t t = 0; t < length; ++t, out += s.tests) {
    const int32_t* const ids = block.ids_of(run, t);
    const Real<T> weight = batch_weight<T>(ids, s.batch, s.mean);
    auto y = block.factor(s.lags, ids, weight);
    for (int64_t lag = 1; lag <= s.lags; ++lag) {
      const auto alpha = block.factor(lag - 1, ids, weight);
      // What was made a step ago is still here.
      const bool here = s.free_running && lag == 1;
      y = fma(alpha, here ? last : block.known_past(run, t - lag), y);
    }
    if (s.mask != nullptr) block.drop_unknown(run, t, &y);
    if (t + kAhead < length) fetch<1>(out + kAhead * s.tests, block.lanes());
    y.write(out, tail);
    last = y;
  }
  for (int64_t t = length; t < s.steps; ++t, out += s.tests) B::L::all(Real<T>{0}).write(out, tail);
}

// Steps [first, end) of a run from the last to the first, whose shares go to `shares`. The ring's
// row i holds what steps after it have to say about y at every step t with t % n = i (of t < 0:
// n + t), for as long as one of them is still to come.
template <class T, int kCount>
void back_steps(const MarkovBackward<T>& p, int64_t run, int64_t first, int64_t end, int64_t at,
                int tail, Real<T>* shares) {
  using R = Real<T>;
  using B = Block<T, kCount>;
  using L = typename B::L;
  const MarkovSteps<T>& s = p.s;
  const B block{s, at, tail};
  const int64_t length = block.length(run), n = s.lags;
  const bool carries = s.free_running || p.grad_y != nullptr;
  const L zeros = L::all(R{0});
  R* const ring = p.ring + at;
  for (int64_t i = 0; carries && end == s.steps && i < n; ++i)
    zeros.write(ring + i * kMarkovLanes, kWidth);
  R* const grad_y = p.grad_y != nullptr ? p.grad_y + run * s.steps * s.tests + at : nullptr;
  for (int64_t t = length > first ? length : first; grad_y != nullptr && t < end; ++t)
    zeros.write(grad_y + t * s.tests, tail);
  const int64_t last = end < length ? end : length;
  int64_t slot = last % n;
  for (int64_t t = last - 1; t >= first; --t) {
    slot = slot > 0 ? slot - 1 : n - 1;  // t % n
    const int32_t* const ids = block.ids_of(run, t);
    const R weight = batch_weight<T>(ids, s.batch, s.mean);
    const R* const grad = p.grad + run * p.grad_run + t * p.grad_step + at;
    if (t > kAhead) {
      fetch<0>(grad - kAhead * p.grad_step, block.lanes());
      fetch<0>(block.past(run, t - 1 - kAhead), block.lanes());
    }
    L lam = L::read(grad, tail);
    if (s.mask != nullptr) block.drop_unknown(run, t, &lam);
    if (carries) {
      const L later = L::read(ring + slot * kMarkovLanes, kWidth);
      if (s.free_running) {
        lam = lam + later;
      } else {
        later.write(grad_y + t * s.tests, tail);
        const uint8_t* const there = block.mask(run, t);
        for (int k = 0; there != nullptr && k < block.lanes(); ++k)
          if (there[k] == 0) grad_y[t * s.tests + k] = R{0};
      }
    }
    const L share = s.mean ? lam * L::all(weight) : lam;
    R* to = shares + (t - first) * p.shares_row + at;
    for (int64_t plane = 0; plane < n; ++plane, to += p.shares_plane)
      (share * block.known_past(run, t - 1 - plane)).write(to, kWidth);
    share.write(to, kWidth);
    if (!carries) continue;
    int64_t from = slot;
    for (int64_t plane = 0; plane < n; ++plane) {
      from = from > 0 ? from - 1 : n - 1;  // of step t - 1 - plane
      R* const row = ring + from * kMarkovLanes;
      const L x = block.factor(plane, ids, weight) * lam;
      // The oldest one takes the row of this step, which has been read.
      if (plane + 1 == n) {
        x.write(row, kWidth);
      } else {
        add_to<T, kCount>(row, x, kWidth);
      }
    }
  }
  for (int64_t i = 0; p.grad_y0 != nullptr && first == 0 && i < n; ++i)
    L::read(ring + i * kMarkovLanes, kWidth).write(p.grad_y0 + (run * n + i) * s.tests + at, tail);
}

// Entries that are added one after another, so that a sum of many is not the less exact for it.
constexpr int64_t kRun = 16;

template <class T, int kCount>
void backward(const MarkovBackward<T>& p, const MarkovStretch& of, int64_t at, int tail) {
  const int64_t steps = p.s.steps;
  for (int64_t end = of.end; end > of.begin;) {
    const int64_t run = (end - 1) / steps, start = run * steps;
    const int64_t first = of.begin > start ? of.begin : start;
    back_steps<T, kCount>(p, run, first - start, end - start, at, tail,
                          p.shares + (first - of.begin) * p.shares_row);
    end = first;
  }
  for (int64_t plane = 0; plane <= p.s.lags; ++plane) {
    const Real<T>* const shares = p.shares + plane * p.shares_plane + at;
    for (int64_t k = 0; k < of.count; ++k) {
      const int64_t before = k > 0 ? of.ends[k - 1] : 0;
      const int64_t to = plane * p.out_plane + of.rows[k] * p.out_row + at;
      auto sum = Lanes<Real<T>, kCount>::all(Real<T>{0});
      for (int64_t i = before; i < of.ends[k]; i += kRun) {
        const int64_t left = of.ends[k] - i;
        sum = sum + sum_rows<Real<T>, kCount>(shares, p.shares_row, of.places + i,
                                              left < kRun ? left : kRun, kWidth);
      }
      if (p.out != nullptr) {
        sum.write(p.out + to, tail);
      } else {
        add_to<Real<T>, kCount>(p.sums + to, sum, tail);
      }
    }
  }
}

}  // namespace

#define TENFOLD_MARKOV_RUNS(T)                                                                   \
  void markov_forward(const MarkovForward<T>& p, int64_t begin, int64_t end, int64_t lanes) {    \
    over_lanes(lanes, [&]<int kCount>(int64_t at, int tail) {                                    \
      for (int64_t run = begin; run < end; ++run) forward<T, kCount>(p, run, at, tail);          \
    });                                                                                          \
  }                                                                                              \
  void markov_backward(const MarkovBackward<T>& p, const MarkovStretch& of, int64_t lanes) {     \
    over_lanes(lanes,                                                                            \
               [&]<int kCount>(int64_t at, int tail) { backward<T, kCount>(p, of, at, tail); }); \
  }
TENFOLD_MARKOV_RUNS(float)
TENFOLD_MARKOV_RUNS(bf16_t)
TENFOLD_MARKOV_RUNS(double)
#undef TENFOLD_MARKOV_RUNS

void round_row(const float* from, int64_t n, bf16_t* to) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

TENFOLD_ISA_END
