// CPU registration of fuse_heads, fuse_heads_backward and collapse_heads: one task per (group,
// dim).
#include "attention/fuse_heads.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "attention/heads_ops.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace tenfold::cpu {
namespace {

// groups as head indices [N * g], each head exactly once.
std::vector<int64_t> read_partition(const char* op, const Tensor& groups, int64_t heads) {
  const auto at = read_ints<int64_t>(groups);
  const int64_t g = groups.sizes()[1];
  std::vector<int64_t> place(heads, -1);
  for (int64_t i = 0; i < static_cast<int64_t>(at.size()); ++i) {
    TENFOLD_CHECK_INDEX(at[i] >= 0 && at[i] < heads, "tenfold::", op, ": groups[", i / g, ", ",
                        i % g, "] must be a head in [0, ", heads, "), got ", at[i]);
    const int64_t before = place[at[i]];
    TENFOLD_CHECK_VALUE(before < 0, "tenfold::", op,
                        ": groups must hold every head once, but head ", at[i], " is at [",
                        before / g, ", ", before % g, "] and at [", i / g, ", ", i % g, "]");
    place[at[i]] = i;
  }
  return at;
}

// Rows (head, dim) of a tensor [H, d, m] or [N, g, d, m] with contiguous rows.
struct Rows {
  char* data;
  int64_t group_stride, head_stride, dim_stride;  // bytes
  Rows(const Tensor& t, int64_t size)
      : data(static_cast<char*>(t.data_ptr())),
        group_stride(t.dim() == 4 ? t.strides()[0] * size : 0),
        head_stride(t.strides()[t.dim() - 3] * size),
        dim_stride(t.strides()[t.dim() - 2] * size) {}
  void* at(int64_t n, int64_t h, int64_t i) const {
    return data + n * group_stride + h * head_stride + i * dim_stride;
  }
};

struct Problem {
  int64_t groups, size, dims, length;  // N, g, d, m
  Dtype dtype;
  std::vector<int64_t> head;  // [N * g]
};

Problem read_problem(const char* op, const Tensor& w, const Tensor& groups) {
  return {groups.sizes()[0], groups.sizes()[1],         w.sizes()[1],
          w.sizes()[2],      to_dtype(w.scalar_type()), read_partition(op, groups, w.sizes()[0])};
}

// A task reads and writes about 2 g m elements; ten GB/s, or four multiply-adds a nanosecond.
double micros_per_row(const Problem& p, int64_t outputs) {
  return static_cast<double>(p.length * p.size) * (4e-4 + 1e-4 * static_cast<double>(outputs));
}

// coef[n][i][in][out] for the mixture of `in` inputs: from_omega(n, i, in, out).
template <class F>
std::vector<float> gather_coefficients(const Problem& p, int64_t outputs, const F& from_omega) {
  std::vector<float> coef(p.groups * p.dims * p.size * outputs);
  float* to = coef.data();
  for (int64_t n = 0; n < p.groups; ++n)
    for (int64_t i = 0; i < p.dims; ++i)
      for (int64_t in = 0; in < p.size; ++in)
        for (int64_t out = 0; out < outputs; ++out) *to++ = from_omega(n, i, in, out);
  return coef;
}

// omega[n, h, j, i] of a contiguous tensor.
struct Omega {
  Tensor held;
  const float* data;
  int64_t g, d;
  explicit Omega(const Tensor& t)
      : held(torch::stable::contiguous(t)),
        data(data_as<const float>(held)),
        g(t.sizes()[1]),
        d(t.sizes()[3]) {}
  float at(int64_t n, int64_t h, int64_t j, int64_t i) const {
    return data[((n * g + h) * g + j) * d + i];
  }
};

Tensor fuse_heads_op(Tensor w_in, Tensor omega_in, Tensor groups) {
  constexpr auto op = "fuse_heads";
  check_fuse_heads(op, w_in, omega_in, groups);
  const Problem p = read_problem(op, w_in, groups);
  const Tensor w = with_contiguous_rows(w_in);
  const Omega omega(omega_in);
  const Tensor out = new_output(w, {p.groups, p.size, p.dims, p.length}, w.scalar_type());
  const Rows from(w, dtype_size(p.dtype)), to(out, dtype_size(p.dtype));
  const auto coef = gather_coefficients(
      p, p.size, [&](auto n, auto i, auto j, auto h) { return omega.at(n, h, j, i); });
  parallel_for(p.groups * p.dims, micros_per_row(p, p.size), [&](int64_t begin, int64_t end) {
    std::vector<const void*> in(p.size);
    std::vector<void*> outs(p.size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.dims, i = task % p.dims;
      for (int64_t h = 0; h < p.size; ++h) {
        in[h] = from.at(0, p.head[n * p.size + h], i);
        outs[h] = to.at(n, h, i);
      }
      TENFOLD_ISA_CALL(mix_rows, MixRows{in.data(), outs.data(), p.size, p.size,
                                         coef.data() + task * p.size * p.size, p.size, p.length,
                                         p.dtype, false});
    }
  });
  return out;
}

Tensor collapse_heads_op(Tensor w_in, Tensor omega_in, Tensor groups) {
  constexpr auto op = "collapse_heads";
  check_fuse_heads(op, w_in, omega_in, groups);
  const Problem p = read_problem(op, w_in, groups);
  const Tensor w = with_contiguous_rows(w_in);
  const Omega omega(omega_in);
  const Tensor out = new_output(w, {p.groups, p.dims, p.length}, w.scalar_type());
  const Rows from(w, dtype_size(p.dtype)), to(out, dtype_size(p.dtype));
  const auto coef = gather_coefficients(p, 1, [&](auto n, auto i, auto j, auto) {
    float sum = 0.0f;
    for (int64_t h = 0; h < p.size; ++h) sum += omega.at(n, h, j, i);
    return sum / static_cast<float>(p.size);
  });
  parallel_for(p.groups * p.dims, micros_per_row(p, 1), [&](int64_t begin, int64_t end) {
    std::vector<const void*> in(p.size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.dims, i = task % p.dims;
      for (int64_t h = 0; h < p.size; ++h) in[h] = from.at(0, p.head[n * p.size + h], i);
      void* row = to.at(0, n, i);
      TENFOLD_ISA_CALL(mix_rows, MixRows{in.data(), &row, p.size, 1, coef.data() + task * p.size, 1,
                                         p.length, p.dtype, false});
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> fuse_heads_backward_op(Tensor dout_in, Tensor w_in, Tensor omega_in,
                                                  Tensor groups, bool need_dw, bool need_domega) {
  constexpr auto op = "fuse_heads_backward";
  check_fuse_heads_backward(op, dout_in, w_in, omega_in, groups);
  const Problem p = read_problem(op, w_in, groups);
  const Tensor w = with_contiguous_rows(w_in), dout = with_contiguous_rows(dout_in);
  const Omega omega(omega_in);
  const Tensor dw = need_dw ? new_output(w, {w.sizes()[0], p.dims, p.length}, w.scalar_type())
                            : new_output(w, {0}, w.scalar_type());
  const Tensor domega = need_domega
                            ? new_output(w, {p.groups, p.size, p.size, p.dims}, ScalarType::Float)
                            : new_output(w, {0}, ScalarType::Float);
  const Rows from(w, dtype_size(p.dtype)), grad(dout, dtype_size(p.dtype));
  const auto coef = gather_coefficients(
      p, p.size, [&](auto n, auto i, auto h, auto j) { return omega.at(n, h, j, i); });
  float* to_omega = need_domega ? data_as<float>(domega) : nullptr;
  parallel_for(p.groups * p.dims, 2 * micros_per_row(p, p.size), [&](int64_t begin, int64_t end) {
    std::vector<const void*> in(p.size), weights(p.size);
    std::vector<void*> outs(p.size);
    std::vector<float> dots(p.size * p.size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.dims, i = task % p.dims;
      for (int64_t h = 0; h < p.size; ++h) {
        in[h] = grad.at(n, h, i);
        weights[h] = from.at(0, p.head[n * p.size + h], i);
      }
      if (need_domega) {
        TENFOLD_ISA_CALL(row_dots, RowDots{in.data(), weights.data(), p.size, p.size, p.length,
                                           p.dtype, dots.data()});
        for (int64_t at = 0; at < p.size * p.size; ++at)
          to_omega[(n * p.size * p.size + at) * p.dims + i] = dots[at];
      }
      if (need_dw) {
        const Rows to(dw, dtype_size(p.dtype));
        for (int64_t h = 0; h < p.size; ++h) outs[h] = to.at(0, p.head[n * p.size + h], i);
        TENFOLD_ISA_CALL(mix_rows, MixRows{in.data(), outs.data(), p.size, p.size,
                                           coef.data() + task * p.size * p.size, p.size, p.length,
                                           p.dtype, false});
      }
    }
  });
  return {dw, domega};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("fuse_heads", TORCH_BOX(&tenfold::cpu::fuse_heads_op));
  m.impl("fuse_heads_backward", TORCH_BOX(&tenfold::cpu::fuse_heads_backward_op));
  m.impl("collapse_heads", TORCH_BOX(&tenfold::cpu::collapse_heads_op));
}
