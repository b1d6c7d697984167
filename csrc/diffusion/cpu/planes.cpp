// SPDX-License-Identifier: Apache-2.0
// CPU registration of the parts of conv1d_planes.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "diffusion/planes_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerElement = 2e-4;
constexpr int64_t kBlock = 8192;  // of a sum in float32

// f(first, end) of the positions at the ends of a row, and of what is between.
template <class F, class G>
void in_parts(int64_t size, int64_t length, const F& ends, const G& between) {
  const int64_t pad = std::min(size / 2, length), high = std::max(length - size / 2, pad);
  ends(0, pad);
  between(pad, high);
  ends(high, length);
}

void wide_add(const PlanesAddCall& c, int64_t row) {
  const double* const taps = data_as<double>(c.taps) + row * c.size();
  double* const y = data_as<double>(c.y) + row * c.length();
  const double whole = planes_at(taps, c.size(), c.size() / 2, c.length() + c.size());
  const double bias = c.bias ? data_as<double>(*c.bias)[row % c.channels()] : 0.0;
  for (int64_t l = 0; l < c.length(); ++l) {
    if (c.edges_only && planes_whole(c.size(), l, c.length())) continue;
    const double part = planes_at(taps, c.size(), l, c.length());
    y[l] += c.edges_only ? part - whole : part + bias;
  }
}

void some_add(const PlanesAddCall& c, int64_t row) {
  const auto size = static_cast<int64_t>(c.y.element_size());
  const Dtype dtype = to_dtype(c.y.scalar_type());
  const float* const taps = data_as<float>(c.taps) + row * c.size();
  char* const y = data_as<char>(c.y) + row * c.length() * size;
  const float whole = planes_at(taps, c.size(), c.size() / 2, c.length() + c.size());
  float bias = 0.0f;
  if (c.bias)  // one number of any dtype
    bias = static_cast<float>(TENFOLD_ISA_CALL(
        sum_numbers, dtype, data_as<char>(*c.bias) + row % c.channels() * size, 1));
  const auto add = [&](int64_t l, int64_t n, float number) {
    TENFOLD_ISA_CALL(add_number, dtype, y + l * size, n, number);
  };
  in_parts(
      c.size(), c.length(),
      [&](int64_t begin, int64_t end) {
        for (int64_t l = begin; l < end; ++l) {
          const float part = planes_at(taps, c.size(), l, c.length());
          add(l, 1, c.edges_only ? part - whole : part + bias);
        }
      },
      [&](int64_t begin, int64_t end) {
        if (!c.edges_only && end > begin) add(begin, end - begin, whole + bias);
      });
}

void run_add(const PlanesAddCall& c) {
  const bool wide = c.y.scalar_type() == ScalarType::Double;
  const int64_t touched = c.edges_only ? c.size() : c.length();
  parallel_for(c.rows(), kMicrosPerElement * static_cast<double>(touched) + 0.1,
               [&](int64_t first, int64_t last) {
                 for (int64_t row = first; row < last; ++row)
                   wide ? wide_add(c, row) : some_add(c, row);
               });
}

// All of a row but the ends; then what each tap sees of those.
template <class Real, class Get, class Sum>
void sums_of_row(int64_t size, int64_t length, Real* sums, const Get& get, const Sum& sum) {
  double middle = 0.0;
  in_parts(
      size, length, [](int64_t, int64_t) {},
      [&](int64_t begin, int64_t end) {
        for (int64_t l = begin; l < end; l += kBlock) middle += sum(l, std::min(kBlock, end - l));
      });
  for (int64_t k = 0; k < size; ++k) {
    double total = middle;
    in_parts(
        size, length,
        [&](int64_t begin, int64_t end) {
          for (int64_t l = begin; l < end; ++l) {
            const int64_t at = l + k - size / 2;
            if (at >= 0 && at < length) total += get(l);
          }
        },
        [](int64_t, int64_t) {});
    sums[k] = static_cast<Real>(total);
  }
}

void run_sums(const PlanesSumsCall& c) {
  const int64_t size = c.size(), length = c.length();
  const auto bytes = static_cast<int64_t>(c.grad.element_size());
  const bool wide = c.grad.scalar_type() == ScalarType::Double;
  parallel_for(
      c.rows(), kMicrosPerElement * static_cast<double>(length) + 0.1,
      [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          if (wide) {
            const double* const g = data_as<double>(c.grad) + row * length;
            sums_of_row(
                size, length, data_as<double>(c.sums) + row * size, [&](int64_t l) { return g[l]; },
                [&](int64_t l, int64_t n) {
                  double sum = 0.0;
                  for (int64_t i = l; i < l + n; ++i) sum += g[i];
                  return sum;
                });
            continue;
          }
          const char* const g = data_as<char>(c.grad) + row * length * bytes;
          const auto sum = [&](int64_t l, int64_t n) {
            return TENFOLD_ISA_CALL(sum_numbers, to_dtype(c.grad.scalar_type()), g + l * bytes, n);
          };
          sums_of_row(
              size, length, data_as<float>(c.sums) + row * size,
              [&](int64_t l) { return sum(l, 1); }, sum);
        }
      });
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::PlanesOps<&tenfold::cpu::run_add, &tenfold::cpu::run_sums>;
  m.impl("planes_check", TORCH_BOX(&Ops::check));
  m.impl("planes_add_", TORCH_BOX(&Ops::add));
  m.impl("planes_sums", TORCH_BOX(&Ops::sums));
}
