// SPDX-License-Identifier: Apache-2.0
// CPU registration of patch_mse and its gradient. Blocks of patches are tasks, whose sums are added
// in order: results do not depend on threads. The weights' sum comes first, so that the gradient
// can be made in the same pass.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "pixels/cpu/patch_kernels.h"
#include "pixels/mse_ops.h"

namespace tenfold::cpu {
namespace {

constexpr int64_t kBlock = 32;  // positions of a task
constexpr double kMicrosPerByte = 1e-4;
constexpr int64_t kStreamFrom = int64_t{4} << 20;  // bytes of the gradient

// Of the patches that count. Weights are checked: nothing has been written yet.
double sum_of_weights(const MseCall& c) {
  const PatchMse& m = c.mse;
  const int64_t length = m.grid.length();
  double total = 0.0;
  for (int64_t b = 0; b < m.grid.images; ++b) {
    const int64_t first = b * length + m.shift, end = (b + 1) * length;
    if (m.weights.kind == WeightKind::u8) {
      const auto* const bytes = static_cast<const uint8_t*>(m.weights.data);
      uint64_t sum = 0;
      for (int64_t i = first; i < end; ++i) sum += bytes[i];
      total += static_cast<double>(sum);
      continue;
    }
    double sum = 0.0;
    for (int64_t i = first; i < end; ++i) {
      const double w = m.weights[i];
      TENFOLD_CHECK_VALUE(w >= 0.0 && std::isfinite(w), "tenfold::", c.op,
                          ": mask must be finite, and 0 or above, got ", w, " at ", i);
      sum += w;
    }
    total += sum;
  }
  return total;
}

double number(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *data_as<double>(t) : *data_as<float>(t);
}

void put_number(const Tensor& t, double x) {
  if (t.scalar_type() == ScalarType::Double) {
    *data_as<double>(t) = x;
  } else {
    *data_as<float>(t) = static_cast<float>(x);
  }
}

// -- float64: the definition, in double -----------------------------------------------------------

struct WidePatch {
  std::vector<double> values;  // of an image: u / 255, or as they are

  void read(const PatchMse& m, int64_t offset) {
    const PatchBox& b = m.grid.box;
    values.clear();
    const auto* const bytes = static_cast<const uint8_t*>(m.grid.data);
    const auto* const floats = static_cast<const float*>(m.grid.data);
    for (int64_t i = 0; i < b.size[0]; ++i)
      for (int64_t j = 0; j < b.size[1]; ++j)
        for (int64_t k = 0; k < b.size[2]; ++k) {
          const int64_t at = offset + i * b.stride[0] + j * b.stride[1] + k * b.stride[2];
          values.push_back(m.grid.pixel == Pixel::u8 ? bytes[at] : floats[at]);
        }
    if (m.normalize) return normalize(m);
    if (m.grid.pixel == Pixel::u8)
      for (double& x : values) x /= 255.0;
  }

 private:
  void normalize(const PatchMse& m) {
    const auto n = static_cast<int64_t>(values.size());
    PatchNorm norm;
    if (m.grid.pixel == Pixel::u8) {
      uint64_t sum = 0, squares = 0;
      for (const double x : values) {
        const auto u = static_cast<uint64_t>(x);
        sum += u, squares += u * u;
      }
      norm = norm_of_bytes(sum, squares, n, m.eps);
    } else {
      const double from = values[0];
      double sum = 0.0, squares = 0.0, rest = 0.0;
      for (const double x : values) sum += x - from;
      const double center = from + sum / static_cast<double>(n);
      for (const double x : values) rest += x - center, squares += (x - center) * (x - center);
      norm = norm_of_floats(center, rest, squares, n, m.eps);
    }
    for (double& x : values) x = (x - norm.center) * norm.scale + norm.offset;
  }
};

double wide_errors(const PatchMse& m, double slope, int64_t begin, int64_t end, double* per_patch) {
  const int64_t length = m.grid.length(), n = m.grid.values();
  WidePatch target;
  double total = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / length, position = i % length;
    const double weight = m.has_target(position) ? m.weights[i + m.shift] : 0.0;
    const auto row = [&](const PatchRows& r) {
      return static_cast<double*>(r.data) + image * r.image_step + position * r.row_step;
    };
    double error = 0.0;
    if (weight != 0.0) {
      target.read(m, m.grid.offset(image, position + m.shift));
      const double* const f = row(m.pred);
      for (int64_t k = 0; k < n; ++k) {
        const double e = f[k] - target.values[k];
        error += e * e;
        if (m.grad.data != nullptr) row(m.grad)[k] = slope * weight * e;
      }
      error /= static_cast<double>(n);
      total += weight * error;
    } else if (m.grad.data != nullptr) {
      for (int64_t k = 0; k < n; ++k) row(m.grad)[k] = 0.0;
    }
    if (per_patch != nullptr) per_patch[i] = error;
  }
  return total;
}

// -------------------------------------------------------------------------------------------------

void run_mse(const MseCall& c) {
  const PatchMse& m = c.mse;
  const int64_t count = c.positions(), n = m.grid.values();
  const double by = c.grad_loss ? number(*c.grad_loss) : 1.0;
  if (c.made && by == 1.0) return;
  const double weights = c.grad_loss ? 0.0 : sum_of_weights(c);
  // What is divided by is the number that is given back: both passes must use the same one.
  const double denom = c.given_denom                  ? number(*c.given_denom)
                       : c.real == ScalarType::Double ? weights
                                                      : static_cast<float>(weights);
  const double slope = error_slope(by, n, denom);
  const auto size = static_cast<int64_t>(c.pred.element_size());
  const bool past_caches = c.grad && m.grad.data != m.pred.data && count * n * size >= kStreamFrom;
  const int64_t blocks = ceil_div(count, kBlock);
  std::vector<double> sums(static_cast<size_t>(blocks));
  const int64_t bytes = n * (pixel_size(m.grid.pixel) + size * (c.grad ? 2 : 1));
  parallel_for(blocks, kBlock * (0.03 + kMicrosPerByte * static_cast<double>(bytes)),
               [&](int64_t first, int64_t last) {
                 const Scratch work(patch_work(n));
                 for (int64_t i = first; i < last; ++i) {
                   const int64_t begin = i * kBlock, end = std::min(count, begin + kBlock);
                   sums[i] =
                       c.real == ScalarType::Double
                           ? wide_errors(m, slope, begin, end,
                                         c.per_patch ? data_as<double>(*c.per_patch) : nullptr)
                           : TENFOLD_ISA_CALL(patch_errors, m, to_dtype(c.pred.scalar_type()),
                                              slope, past_caches, begin, end, work.data());
                 }
               });
  if (!c.loss) return;
  double total = 0.0;
  for (const double s : sums) total += s;
  put_number(*c.loss, denom > 0.0 ? total / denom : 0.0);
  put_number(*c.denom, denom);
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  using Ops = tenfold::MseOps<&tenfold::cpu::run_mse>;
  m.impl("patch_mse", TORCH_BOX(&Ops::loss));
  m.impl("patch_mse_forward", TORCH_BOX(&Ops::forward));
  m.impl("patch_mse_", TORCH_BOX(&Ops::over));
  m.impl("patch_mse_backward", TORCH_BOX(&Ops::backward));
  m.impl("patch_mse_backward_", TORCH_BOX(&Ops::backward_out));
}
