// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <utility>

#include "core/cpu/vec.h"
#include "rl/cpu/row_kernels.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kLanes = 8;  // sums in parallel, added in the same order on every instruction set

template <class T, class Wanted>
int64_t count_if(const T* x, int64_t n, Wanted wanted) {
  constexpr int64_t kPart = int64_t{1} << 20;  // counted in 32 bits, as wide as what is counted
  int64_t count = 0;
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t end = first + kPart < n ? first + kPart : n;
    int32_t part = 0;
    for (int64_t i = first; i < end; ++i) part += wanted(x[i]) ? 1 : 0;
    count += part;
  }
  return count;
}

template <class T>
double kl_terms_of(const T* now, const T* old, int64_t n, KlBy by, double scale, double* out) {
  double sums[kLanes] = {};
  const auto run = [&](auto term) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) {
        const double k = term(static_cast<double>(now[i + l]) - static_cast<double>(old[i + l]));
        sums[l] += k;
        out[i + l] = scale * k;
      }
    for (int l = 0; i < n; ++i, ++l) {
      const double k = term(static_cast<double>(now[i]) - static_cast<double>(old[i]));
      sums[l] += k;
      out[i] = scale * k;
    }
  };
  if (by == KlBy::k1) {
    run([](double k) { return k; });
  } else if (by == KlBy::k2) {
    run([](double k) { return 0.5 * k * k; });
  } else {
    run([](double k) { return kl_term(KlBy::k3, k); });
  }
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) sums[l] += sums[l + step];
  return sums[0];
}

// x where `keep` is all ones, 0 where it is 0, without a branch.
inline double kept(double x, int64_t keep) {
  int64_t bits;
  memcpy(&bits, &x, 8);
  bits &= keep;
  memcpy(&x, &bits, 8);
  return x;
}

template <bool kTwo>
void sums_of(const int32_t* seg, int64_t n, const double* a, const double* b, double* sum_a,
             double* sum_b, int32_t* length) {
  int32_t before = -1, count = 0;
  double x = 0.0, y = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t s = seg[i];
    const int64_t same = -static_cast<int64_t>(s == before);
    x = kept(x, same) + a[i];
    sum_a[s] = x;
    if (kTwo) {
      y = kept(y, same) + b[i];
      sum_b[s] = y;
    }
    count = (count & static_cast<int32_t>(same)) + 1;
    length[s] = count;
    before = s;
  }
}

constexpr int64_t kWindow = 8, kChunk = 512;

// Of tokens [begin, end): to_i = from_i + from_{i - by}, if that is of the same segment. from_i
// lies at from[i - from_at], likewise to.
template <class T>
inline void widen_window(const int32_t* seg, int64_t begin, int64_t end, int64_t by, const T* from,
                         int64_t from_at, T* to, int64_t to_at) {
  int64_t i = begin;
  for (; i < by && i < end; ++i) to[i - to_at] = from[i - from_at];
  const T *const near = from - from_at + i, *const far = near - by;
  T* const out = to - to_at + i;
  const int32_t *const now = seg + i, *const then = now - by;
  for (int64_t k = 0; k < end - i; ++k) out[k] = near[k] + (now[k] == then[k] ? far[k] : T{0});
}

// x_i becomes the sum of the last kWindow ones up to i of its segment, in three steps, each
// doubling the window, none of which waits for another token. The last chunk first: those before it
// are as they were.
template <class T>
void window_sums(const int32_t* seg, int64_t n, T* x) {
  T one[kWindow + kChunk], two[kWindow + kChunk];
  for (int64_t first = (n - 1) / kChunk * kChunk; first >= 0; first -= kChunk) {
    const int64_t end = n - first < kChunk ? n : first + kChunk;
    const int64_t four = first < 4 ? 0 : first - 4, six = first < 6 ? 0 : first - 6;
    widen_window(seg, six, end, 1, x, 0, one, six);
    widen_window(seg, four, end, 2, one, six, two, four);
    widen_window(seg, first, end, 4, two, four, x, 0);
  }
}

constexpr int32_t kShort = 16;

// All segments but the last are of one short length, as fixed n-grams are: a loop whose branches
// are foreseen is faster than windows.
bool is_uniform(const int32_t* length, int64_t segments) {
  int32_t differ = 0;
  for (int64_t t = 0; t + 1 < segments; ++t) differ |= length[t] ^ length[0];
  return segments > 0 && differ == 0 && length[0] <= kShort && length[segments - 1] <= kShort;
}

template <int kEach, class T>
void sums_of_each(const T* x, int64_t segments, T* sums) {
  for (int64_t t = 0; t < segments; ++t, x += kEach) {
    T sum = x[0];
    for (int i = 1; i < kEach; ++i) sum += x[i];
    sums[t] = sum;
  }
}

template <class T>
void uniform_sums(const T* x, const int32_t* length, int64_t segments, T* sums) {
  const int64_t whole = segments - 1;
  const int32_t each = length[0];
  [&]<int... kLess>(std::integer_sequence<int, kLess...>) {
    ((each == kLess + 1 ? sums_of_each<kLess + 1>(x, whole, sums) : void()), ...);
  }(std::make_integer_sequence<int, kShort>());
  T last = x[whole * each];
  for (int32_t i = 1; i < length[whole]; ++i) last += x[whole * each + i];
  sums[whole] = last;
}

// Where each segment ends; seg is consecutive.
int64_t find_ends(const int32_t* seg, int64_t n, uint32_t* ends) {
  const auto* ids = reinterpret_cast<const uint32_t*>(seg);
  int64_t count = 0, i = 0;
  for (; i + kWidth < n; i += kWidth)
    count += store_chosen(ends + count, above(load(ids + i + 1), load(ids + i)),
                          iota() + seti(static_cast<uint32_t>(i + 1)));
  for (; i < n; ++i)
    if (i + 1 == n || seg[i] != seg[i + 1]) ends[count++] = static_cast<uint32_t>(i + 1);
  return count;
}

template <class T>
void run_sums_of(const int32_t* seg, const uint32_t* ends, int64_t segments, T* a, T* b, T* sum_a,
                 T* sum_b, int32_t* length) {
  const int64_t n = segments > 0 ? ends[segments - 1] : 0;
  T* const from[] = {a, b};
  T* const to[] = {sum_a, sum_b};
  int64_t begin = 0;
  for (int64_t t = 0; t < segments; ++t) {
    length[t] = static_cast<int32_t>(ends[t] - begin);
    begin = ends[t];
  }
  const bool uniform = is_uniform(length, segments);
  for (int k = 0; k < 2; ++k) {
    T *const x = from[k], *const sums = to[k];
    if (x == nullptr) continue;
    if (uniform) {
      uniform_sums(x, length, segments, sums);
      continue;
    }
    if (segments < n) window_sums(seg, n, x);
    for (int64_t t = 0; t < segments; ++t) {
      const T* const last = x + ends[t] - 1;
      auto sum = static_cast<double>(*last);
      for (int64_t i = kWindow; i < length[t]; i += kWindow) sum += static_cast<double>(last[-i]);
      sums[t] = static_cast<T>(sum);
    }
  }
}

// A_t = x_t + c A_{t+1}, in place. Sums of the next 8 terms come first, in three steps that double
// them; only the rest waits for what is later, a step of 8 at a time.
void scan_back(double* x, int64_t n, double c) {
  double power = c;
  for (int64_t by = 1; by < kWindow; by *= 2) {
    for (int64_t i = 0; i < n - by; ++i) x[i] += power * x[i + by];
    power *= power;
  }
  int64_t t = n - kWindow;  // x is done from here on
  for (; t >= kWindow; t -= kWindow)
    for (int64_t i = t - kWindow; i < t; ++i) x[i] += power * x[i + kWindow];
  for (int64_t i = 0; i < t; ++i) x[i] += power * x[i + kWindow];
}

template <class From, class T>
void gae_of(const From* value, const From* reward, int64_t n, const GaeRule& rule, const double* g,
            double bootstrap, double* work, T* adv, T* ret) {
  if (n == 0) return;
  const auto delta = [&](int64_t t, double gamma, double later) {
    return static_cast<double>(reward[t]) + gamma * later - static_cast<double>(value[t]);
  };
  if (g == nullptr) {
    const double gamma = rule.gamma;
    for (int64_t t = 0; t + 1 < n; ++t)
      work[t] = delta(t, gamma, static_cast<double>(value[t + 1]));
    work[n - 1] = delta(n - 1, gamma, bootstrap);
    scan_back(work, n, gamma * rule.lam);
  } else {
    double carry = 0.0, later = bootstrap;
    for (int64_t t = n - 1; t >= 0; --t) {
      carry = work[t] = delta(t, g[t], later) + g[t] * rule.lam * carry;
      later = static_cast<double>(value[t]);
    }
  }
  for (int64_t t = 0; t < n; ++t) {
    ret[t] = static_cast<T>(work[t] + static_cast<double>(value[t]));
    adv[t] = static_cast<T>(work[t]);
  }
}

template <class T>
void spread_of(const int32_t* seg, int64_t n, const T* a, const T* b, T* to_a, T* to_b) {
  for (int64_t j = 0; j < n; ++j) {
    const int32_t s = seg[j];
    to_a[j] = a[s];
    to_b[j] = b[s];
  }
}

// A vector may be written beyond the end of its segment where the next one follows.
void spread_run(float* to, int64_t begin, int64_t end, int64_t n, float x) {
  const VF all = set1(x);
  int64_t j = begin;
  for (; j < end && j + kWidth <= n; j += kWidth) store(to + j, all);
  for (; j < end; ++j) to[j] = x;
}
void spread_run(double* to, int64_t begin, int64_t end, int64_t, double x) {
  for (int64_t j = begin; j < end; ++j) to[j] = x;
}

template <class T>
void spread_runs_of(const uint32_t* ends, int64_t segments, const T* a, const T* b, T* to_a,
                    T* to_b) {
  const int64_t n = segments > 0 ? ends[segments - 1] : 0;
  if (n == segments) {
    memcpy(to_a, a, static_cast<size_t>(n) * sizeof(T));
    if (b != nullptr) memcpy(to_b, b, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  int64_t begin = 0;
  for (int64_t t = 0; t < segments; ++t) {
    const int64_t end = ends[t];
    spread_run(to_a, begin, end, n, a[t]);
    if (b != nullptr) spread_run(to_b, begin, end, n, b[t]);
    begin = end;
  }
}

}  // namespace

int64_t count_valid(const int32_t* seg, int64_t width, int64_t limit) {
  const auto most = static_cast<uint32_t>(limit < INT32_MAX ? limit : INT32_MAX);
  return count_if(seg, width, [=](int32_t s) { return static_cast<uint32_t>(s) < most; });
}

int64_t count_equal(const int32_t* seg, int64_t width, int32_t value) {
  return count_if(seg, width, [=](int32_t s) { return s == value; });
}

int64_t count_marked(const uint8_t* mask, int64_t width) {
  return count_if(mask, width, [](uint8_t m) { return m != 0; });
}

double kl_terms(const float* now, const float* old, int64_t n, KlBy by, double scale, double* out) {
  return kl_terms_of(now, old, n, by, scale, out);
}
double kl_terms(const double* now, const double* old, int64_t n, KlBy by, double scale,
                double* out) {
  return kl_terms_of(now, old, n, by, scale, out);
}

void widen(const float* x, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(x[i]);
}
void widen(const double* x, int64_t n, double* out) {
  memcpy(out, x, static_cast<size_t>(n) * sizeof(double));
}

void segment_sums(const int32_t* seg, int64_t n, const double* a, const double* b, double* sum_a,
                  double* sum_b, int32_t* length) {
  if (b == nullptr) return sums_of<false>(seg, n, a, b, sum_a, sum_b, length);
  sums_of<true>(seg, n, a, b, sum_a, sum_b, length);
}

int64_t consecutive_sums(const int32_t* seg, int64_t n, double* a, double* b, uint32_t* ends,
                         double* sum_a, double* sum_b, int32_t* length) {
  const int64_t segments = find_ends(seg, n, ends);
  run_sums_of(seg, ends, segments, a, b, sum_a, sum_b, length);
  return segments;
}

void run_sums(const int32_t* seg, const uint32_t* ends, int64_t segments, float* a, float* b,
              float* sum_a, float* sum_b, int32_t* length) {
  run_sums_of(seg, ends, segments, a, b, sum_a, sum_b, length);
}

void divide(const int32_t* length, int64_t n, double* x) {
  for (int64_t t = 0; t < n; ++t) x[t] /= length[t] > 1 ? static_cast<double>(length[t]) : 1.0;
}

void gae_steps(const double* value, const double* reward, int64_t n, const GaeRule& rule,
               const double* g, double bootstrap, double* work, float* adv, float* ret) {
  gae_of(value, reward, n, rule, g, bootstrap, work, adv, ret);
}
void gae_steps(const double* value, const double* reward, int64_t n, const GaeRule& rule,
               const double* g, double bootstrap, double* work, double* adv, double* ret) {
  gae_of(value, reward, n, rule, g, bootstrap, work, adv, ret);
}
void gae_steps(const float* value, const float* reward, int64_t n, const GaeRule& rule,
               const double* g, double bootstrap, double* work, float* adv, float* ret) {
  gae_of(value, reward, n, rule, g, bootstrap, work, adv, ret);
}

void spread(const int32_t* seg, int64_t n, const float* a, const float* b, float* to_a,
            float* to_b) {
  spread_of(seg, n, a, b, to_a, to_b);
}
void spread(const int32_t* seg, int64_t n, const double* a, const double* b, double* to_a,
            double* to_b) {
  spread_of(seg, n, a, b, to_a, to_b);
}

void spread_runs(const uint32_t* ends, int64_t segments, const float* a, const float* b,
                 float* to_a, float* to_b) {
  spread_runs_of(ends, segments, a, b, to_a, to_b);
}
void spread_runs(const uint32_t* ends, int64_t segments, const double* a, const double* b,
                 double* to_a, double* to_b) {
  spread_runs_of(ends, segments, a, b, to_a, to_b);
}

bool is_consecutive(const int32_t* seg, int64_t n) {
  if (n == 0) return true;
  uint32_t wrong = seg[0] != 0 ? 1u : 0u;
  for (int64_t j = 1; j < n; ++j)
    wrong |= static_cast<uint32_t>(seg[j]) - static_cast<uint32_t>(seg[j - 1]) > 1u ? 1u : 0u;
  return wrong == 0;
}

TENFOLD_ISA_END
