#include <cmath>
#include <cstring>

#include "core/cpu/vec.h"
#include "rl/cpu/row_kernels.h"

TENFOLD_ISA_BEGIN
namespace {

constexpr int kLanes = 8;  // sums in parallel, added in the same order on every instruction set

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

// From the end: A_t = d_t + c A_{t+1}. Blocks of 8 are summed on their own, so that only one step
// of eight waits for the one before it.
void scan_back(double* d, int64_t n, double c) {
  constexpr int kBlock = 8;
  double power[kBlock + 1] = {1.0};
  for (int i = 1; i <= kBlock; ++i) power[i] = power[i - 1] * c;
  double carry = 0.0;
  int64_t t = n;
  for (; t >= kBlock; t -= kBlock) {
    double* const x = d + t - kBlock;
    double sum = x[kBlock - 1];
    for (int i = kBlock - 2; i >= 0; --i) x[i] = sum = x[i] + c * sum;
    for (int i = 0; i < kBlock; ++i) x[i] += power[kBlock - i] * carry;
    carry = x[0];
  }
  while (t > 0) {
    --t;
    carry = d[t] = d[t] + c * carry;
  }
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

}  // namespace

ValidCount count_valid(const int32_t* seg, int64_t width, int64_t limit) {
  const auto most = static_cast<uint32_t>(limit < INT32_MAX ? limit : INT32_MAX);
  int64_t count = 0;
  for (int64_t j = 0; j < width; ++j) count += static_cast<uint32_t>(seg[j]) < most;
  int64_t first = 0;
  for (int64_t j = 0; j < count; ++j) first += static_cast<uint32_t>(seg[j]) < most;
  return {count, first == count};
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

bool is_consecutive(const int32_t* seg, int64_t n) {
  if (n == 0) return true;
  bool wrong = seg[0] != 0;
  for (int64_t j = 1; j < n; ++j)
    wrong |= static_cast<uint32_t>(seg[j]) - static_cast<uint32_t>(seg[j - 1]) > 1u;
  return !wrong;
}

TENFOLD_ISA_END
