// SPDX-License-Identifier: Apache-2.0
#include "norm/cpu/gn1_gelu_wide.h"

#include <cmath>
#include <vector>

#include "core/parallel.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerElement = 0.03;
constexpr double kInverseSqrt2 = 0.70710678118654752440, kInverseSqrt2Pi = 0.39894228040143267794;

double below(double u) {
  return 0.5 * std::erfc(-u * kInverseSqrt2);
}

Moments moments(const double* x, int64_t n) {
  double sum = 0.0, rest = 0.0, squares = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  const auto count = static_cast<double>(n);
  const double mean = sum / count;
  for (int64_t i = 0; i < n; ++i) rest += x[i] - mean, squares += (x[i] - mean) * (x[i] - mean);
  return {count, mean + rest / count, squares - rest * rest / count};
}

}  // namespace

void wide_forward(const Gn1Call& c, const Tensor* mean, const Tensor* rstd) {
  const int64_t length = c.length(), each = c.channels() * length;
  const auto *const weight = data_as<double>(c.weight), *const bias = data_as<double>(c.bias);
  parallel_for(
      c.samples(), kMicrosPerElement * static_cast<double>(each), [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
          const double* const x = data_as<double>(c.x) + b * each;
          const Moments m = moments(x, each);
          const double root = gn1_rstd(m, c.eps);
          if (mean != nullptr) data_as<double>(*mean)[b] = m.mean;
          if (rstd != nullptr) data_as<double>(*rstd)[b] = root;
          double* const y = data_as<double>(c.y) + b * each;
          const double* const more = c.residual ? data_as<double>(*c.residual) + b * each : nullptr;
          for (int64_t i = 0; i < each; ++i) {
            const int64_t k = i / length;
            const double u = (x[i] - m.mean) * root * weight[k] + bias[k];
            y[i] = u * below(u) + (more != nullptr ? more[i] : 0.0);
          }
        }
      });
}

void wide_backward(const Gn1GradCall& c) {
  const int64_t length = c.length(), channels = c.channels(), each = channels * length;
  const auto *const weight = data_as<double>(c.weight), *const bias = data_as<double>(c.bias);
  auto *const dweight = data_as<double>(c.dweight), *const dbias = data_as<double>(c.dbias);
  for (int64_t k = 0; k < channels; ++k) dweight[k] = 0.0, dbias[k] = 0.0;
  std::vector<double> g(static_cast<size_t>(each)), h(static_cast<size_t>(each));
  for (int64_t b = 0; b < c.samples(); ++b) {
    const auto *const x = data_as<double>(c.x) + b * each, *const dy =
                                                               data_as<double>(c.dy) + b * each;
    const double mean = data_as<double>(c.mean)[b], root = data_as<double>(c.rstd)[b];
    double by_g = 0.0, by_gh = 0.0;
    for (int64_t i = 0; i < each; ++i) {
      const int64_t k = i / length;
      h[i] = (x[i] - mean) * root;
      const double u = h[i] * weight[k] + bias[k];
      g[i] = dy[i] * (below(u) + u * kInverseSqrt2Pi * std::exp(-0.5 * u * u));
      dbias[k] += g[i], dweight[k] += g[i] * h[i];
      g[i] *= weight[k];
      by_g += g[i], by_gh += g[i] * h[i];
    }
    by_g /= static_cast<double>(each), by_gh /= static_cast<double>(each);
    double* const dx = data_as<double>(c.dx) + b * each;
    for (int64_t i = 0; i < each; ++i) dx[i] = root * (g[i] - by_g - h[i] * by_gh);
  }
}

}  // namespace tenfold::cpu
