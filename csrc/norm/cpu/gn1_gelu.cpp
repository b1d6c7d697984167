// SPDX-License-Identifier: Apache-2.0
// CPU registration of gn1_gelu. Blocks of a fixed size are the unit of all sums, which are joined
// in their order: results do not depend on threads. Samples that stay in a core's cache are done
// one by one, so that their second reading is from there.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "core/cpu/past_caches.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "norm/cpu/gn1_gelu_wide.h"
#include "norm/gn1_gelu_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosToSum = 1e-4, kMicrosToApply = 6e-4, kMicrosOfSlope = 8e-4;
constexpr int64_t kInCache = int64_t{512} << 10;  // bytes of a sample

std::vector<float> floats_of(const Tensor& t) {
  std::vector<float> made(static_cast<size_t>(t.numel()));
  TENFOLD_ISA_CALL(gn1_widen, to_dtype(t.scalar_type()), t.data_ptr(), t.numel(), made.data());
  return made;
}

void put_number(const Tensor* t, int64_t i, double x) {
  if (t != nullptr) data_as<float>(*t)[i] = static_cast<float>(x);
}

// f(channel, first position, how many) over elements [begin, end) of a sample.
template <class F>
void for_rows(int64_t length, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t channel = begin / length, first = begin % length;
    const int64_t n = std::min(end - begin, length - first);
    f(channel, first, n);
    begin += n;
  }
}

// -- forward --------------------------------------------------------------------------------------

struct Forward {
  const Gn1Call& c;
  const Tensor *mean, *rstd;  // results, or null
  int64_t each, size;
  Dtype dtype;
  bool past;
  std::vector<float> weight, bias;

  const char* x(int64_t sample, int64_t i) const {
    return data_as<char>(c.x) + (sample * each + i) * size;
  }
  Moments block(int64_t sample, int64_t i) const {
    return TENFOLD_ISA_CALL(gn1_moments, dtype, x(sample, i * kGn1Block),
                            std::min(kGn1Block, each - i * kGn1Block));
  }
  void put(int64_t sample, const Moments& m) const {
    put_number(mean, sample, m.mean);
    put_number(rstd, sample, gn1_rstd(m, c.eps));
  }
  void apply(int64_t sample, const Moments& m, int64_t begin, int64_t end) const {
    const double root = gn1_rstd(m, c.eps);
    const auto center = static_cast<float>(m.mean);
    const auto rest = static_cast<float>((static_cast<double>(center) - m.mean) * root);
    for_rows(c.length(), begin, end, [&](int64_t channel, int64_t first, int64_t n) {
      const int64_t at = channel * c.length() + first, to = (sample * each + at) * size;
      const Gn1Span span{dtype,
                         past,
                         center,
                         static_cast<float>(root),
                         rest,
                         weight[channel],
                         bias[channel],
                         x(sample, at),
                         c.residual ? data_as<char>(*c.residual) + to : nullptr,
                         data_as<char>(c.y) + to,
                         n};
      TENFOLD_ISA_CALL(gn1_gelu, span);
    });
  }
};

Moments join_all(const Moments* blocks, int64_t n) {
  Moments all{0.0, 0.0, 0.0};
  for (int64_t i = 0; i < n; ++i) all = joined(all, blocks[i]);
  return all;
}

void run_forward(const Gn1Call& c, const Tensor* mean, const Tensor* rstd) {
  if (c.real == ScalarType::Double) return wide_forward(c, mean, rstd);
  const int64_t samples = c.samples(), each = c.channels() * c.length();
  if (each == 0) {
    for (int64_t b = 0; b < samples; ++b) put_number(mean, b, NAN), put_number(rstd, b, NAN);
    return;
  }
  const auto size = static_cast<int64_t>(c.x.element_size());
  const Forward work{c,
                     mean,
                     rstd,
                     each,
                     size,
                     to_dtype(c.x.scalar_type()),
                     !c.in_place && past_caches(samples * each * size, c.fresh),
                     floats_of(c.weight),
                     floats_of(c.bias)};
  const int64_t blocks = ceil_div(each, kGn1Block);
  const auto count = static_cast<double>(std::min(each, kGn1Block));
  if (each * size <= kInCache && samples > 1) {
    const double micros = (kMicrosToSum + kMicrosToApply) * static_cast<double>(each);
    return parallel_for(samples, micros, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        Moments all{0.0, 0.0, 0.0};
        for (int64_t i = 0; i < blocks; ++i) all = joined(all, work.block(b, i));
        work.put(b, all);
        work.apply(b, all, 0, each);
      }
    });
  }
  std::vector<Moments> parts(static_cast<size_t>(samples * blocks));
  parallel_for(samples * blocks, kMicrosToSum * count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) parts[i] = work.block(i / blocks, i % blocks);
  });
  std::vector<Moments> all(static_cast<size_t>(samples));
  for (int64_t b = 0; b < samples; ++b) {
    all[b] = join_all(parts.data() + b * blocks, blocks);
    work.put(b, all[b]);
  }
  // Backwards: what was read last is in the caches still.
  parallel_for(samples * blocks, kMicrosToApply * count, [&](int64_t first, int64_t last) {
    for (int64_t i = last - 1; i >= first; --i) {
      const int64_t sample = i / blocks, begin = i % blocks * kGn1Block;
      work.apply(sample, all[sample], begin, std::min(each, begin + kGn1Block));
    }
  });
}

// -- backward -------------------------------------------------------------------------------------

struct Backward {
  const Gn1GradCall& c;
  int64_t each, size, pieces;  // pieces: of a channel
  Dtype dtype;
  bool past;
  std::vector<float> weight, bias;

  Gn1GradSpan span(int64_t sample, int64_t channel, int64_t piece) const {
    const int64_t first = piece * kGn1Block;
    const int64_t at = (sample * each + channel * c.length() + first) * size;
    return {dtype,
            past,
            data_as<float>(c.mean)[sample],
            data_as<float>(c.rstd)[sample],
            0.0f,
            weight[channel],
            bias[channel],
            0.0f,
            0.0f,
            data_as<char>(c.dy) + at,
            data_as<char>(c.x) + at,
            data_as<char>(c.dx) + at,
            std::min(kGn1Block, c.length() - first)};
  }
  Gn1Sums sums(int64_t sample, int64_t channel) const {
    Gn1Sums all{0.0, 0.0};
    for (int64_t p = 0; p < pieces; ++p) {
      const Gn1Sums s = TENFOLD_ISA_CALL(gn1_grad_sums, span(sample, channel, p));
      all.g += s.g, all.gh += s.gh;
    }
    return all;
  }
  // Means over a sample of weight g and weight g h.
  Gn1Sums means(const Gn1Sums* channels) const {
    Gn1Sums all{0.0, 0.0};
    for (int64_t i = 0; i < c.channels(); ++i) {
      all.g += weight[i] * channels[i].g;
      all.gh += weight[i] * channels[i].gh;
    }
    const auto n = static_cast<double>(each);
    return {all.g / n, all.gh / n};
  }
  void apply(int64_t sample, int64_t channel, const Gn1Sums& means) const {
    for (int64_t p = pieces - 1; p >= 0; --p) {
      Gn1GradSpan s = span(sample, channel, p);
      s.mean_g = static_cast<float>(means.g), s.mean_gh = static_cast<float>(means.gh);
      TENFOLD_ISA_CALL(gn1_gelu_grad, s);
    }
  }
};

void put_parameters(const Gn1GradCall& c, const std::vector<Gn1Sums>& sums) {
  const int64_t channels = c.channels();
  std::vector<float> dweight(static_cast<size_t>(channels)), dbias(dweight.size());
  for (int64_t i = 0; i < channels; ++i) {
    Gn1Sums all{0.0, 0.0};
    for (int64_t b = 0; b < c.samples(); ++b) {
      all.g += sums[b * channels + i].g;
      all.gh += sums[b * channels + i].gh;
    }
    dweight[i] = static_cast<float>(all.gh), dbias[i] = static_cast<float>(all.g);
  }
  const Dtype dtype = to_dtype(c.weight.scalar_type());
  TENFOLD_ISA_CALL(gn1_narrow, dtype, dweight.data(), channels, c.dweight.data_ptr());
  TENFOLD_ISA_CALL(gn1_narrow, dtype, dbias.data(), channels, c.dbias.data_ptr());
}

void run_backward(const Gn1GradCall& c) {
  if (c.x.scalar_type() == ScalarType::Double) return wide_backward(c);
  const int64_t samples = c.samples(), channels = c.channels(), each = channels * c.length();
  const auto size = static_cast<int64_t>(c.x.element_size());
  const Backward work{c,
                      each,
                      size,
                      ceil_div(c.length(), kGn1Block),
                      to_dtype(c.x.scalar_type()),
                      past_caches(samples * each * size, true),
                      floats_of(c.weight),
                      floats_of(c.bias)};
  std::vector<Gn1Sums> sums(static_cast<size_t>(samples * channels), Gn1Sums{0.0, 0.0});
  const double micros = kMicrosOfSlope * static_cast<double>(c.length()) + 0.05;
  if (each * size * 2 <= kInCache && samples > 1) {
    parallel_for(samples, 2.0 * micros * static_cast<double>(channels),
                 [&](int64_t first, int64_t last) {
                   for (int64_t b = first; b < last; ++b) {
                     Gn1Sums* const own = sums.data() + b * channels;
                     for (int64_t i = 0; i < channels; ++i) own[i] = work.sums(b, i);
                     const Gn1Sums means = work.means(own);
                     for (int64_t i = 0; i < channels; ++i) work.apply(b, i, means);
                   }
                 });
    return put_parameters(c, sums);
  }
  parallel_for(samples * channels, micros, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) sums[i] = work.sums(i / channels, i % channels);
  });
  std::vector<Gn1Sums> means(static_cast<size_t>(samples));
  for (int64_t b = 0; b < samples; ++b) means[b] = work.means(sums.data() + b * channels);
  parallel_for(samples * channels, micros, [&](int64_t first, int64_t last) {
    for (int64_t i = last - 1; i >= first; --i)
      work.apply(i / channels, i % channels, means[i / channels]);
  });
  put_parameters(c, sums);
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::Gn1Ops<&tenfold::cpu::run_forward, &tenfold::cpu::run_backward>;
  m.impl("gn1_gelu", TORCH_BOX(&Ops::forward));
  m.impl("gn1_gelu_", TORCH_BOX(&Ops::forward_out));
  m.impl("gn1_gelu_backward", TORCH_BOX(&Ops::backward));
}
