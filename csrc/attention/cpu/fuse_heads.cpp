// SPDX-License-Identifier: Apache-2.0
// CPU registration of fuse_heads, fuse_heads_backward and collapse_heads: one task per (group,
// dim).
#include "attention/fuse_heads.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "attention/heads_ops.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/scratch.h"
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

// A task moves about 2 g m elements and multiplies g m of them by each output's coefficient.
double micros_per_task(const Problem& p, int64_t outputs) {
  return static_cast<double>(p.length * p.size) * (2e-4 + 1e-5 * static_cast<double>(outputs));
}

// From this size on outputs are written past the caches: a streamed line is not read first (67 MB:
// 2.2 ms instead of 3.6; 7.5 for groups of 8, whose lines share a cache set). Smaller ones are
// often used at once.
constexpr int64_t kStreamFrom = int64_t{8} << 20;

bool can_stream(const Tensor& out, Dtype dtype) {
  const int64_t size = dtype_size(dtype), row = out.sizes()[out.dim() - 1] * size;
  return out.numel() * size >= kStreamFrom && row % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0;
}

constexpr int64_t kDimBlock = 16;  // a cache line of omega

// Calls f(n, first, last) for blocks of dims of every group, in parallel.
template <class F>
void for_dim_blocks(const Problem& p, const F& f) {
  const int64_t blocks = (p.dims + kDimBlock - 1) / kDimBlock;
  const double micros = static_cast<double>(p.size * p.size * kDimBlock) * 1e-3;
  parallel_for(p.groups * blocks, micros, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t first = at % blocks * kDimBlock;
      f(at / blocks, first, std::min(first + kDimBlock, p.dims));
    }
  });
}

enum class Order { heads_by_inputs, inputs_by_heads };

// omega [N, g h, g j, d] -> [N, d, h, j] or [N, d, j, h]: the coefficients of a task side by side.
std::vector<float> coefficients_of(const Problem& p, const Tensor& omega_in, Order order) {
  const Tensor omega = torch::stable::contiguous(omega_in);
  const float* data = data_as<float>(omega);
  const int64_t g = p.size, d = p.dims, pairs = g * g;
  std::vector<float> coef(p.groups * d * pairs);
  for_dim_blocks(p, [&](int64_t n, int64_t first, int64_t last) {
    for (int64_t at = 0; at < pairs; ++at) {
      const int64_t from = order == Order::heads_by_inputs ? at : at % g * g + at / g;
      const float* row = data + (n * pairs + from) * d;
      for (int64_t i = first; i < last; ++i) coef[(n * d + i) * pairs + at] = row[i];
    }
  });
  return coef;
}

// mean over h of omega[n, h, j, i] -> [N, d, j].
std::vector<float> mean_coefficients_of(const Problem& p, const Tensor& omega_in) {
  const Tensor omega = torch::stable::contiguous(omega_in);
  const float* data = data_as<float>(omega);
  const int64_t g = p.size, d = p.dims;
  std::vector<float> coef(p.groups * d * g);
  for_dim_blocks(p, [&](int64_t n, int64_t first, int64_t last) {
    for (int64_t j = 0; j < g; ++j)
      for (int64_t i = first; i < last; ++i) {
        float sum = 0.0f;
        for (int64_t h = 0; h < g; ++h) sum += data[((n * g + h) * g + j) * d + i];
        coef[(n * d + i) * g + j] = sum / static_cast<float>(g);
      }
  });
  return coef;
}

// Runs one task per (group, dim): outputs = mixtures of the group's heads of w.
void mix_heads(const Problem& p, const Tensor& w, const Tensor& out, const std::vector<float>& coef,
               int64_t outputs) {
  const Rows from(w, dtype_size(p.dtype)), to(out, dtype_size(p.dtype));
  const bool stream = can_stream(out, p.dtype);
  parallel_for(p.groups * p.dims, micros_per_task(p, outputs), [&](int64_t begin, int64_t end) {
    const Scratch scratch(mix_scratch(p.size, outputs) * 4);
    std::vector<const void*> in(p.size);
    std::vector<void*> outs(outputs);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.dims, i = task % p.dims;
      for (int64_t h = 0; h < p.size; ++h) in[h] = from.at(0, p.head[n * p.size + h], i);
      // One output: [N, d, m] has its groups where others have heads.
      for (int64_t h = 0; h < outputs; ++h)
        outs[h] = out.dim() == 3 ? to.at(0, n, i) : to.at(n, h, i);
      const MixRows rows{
          in.data(), outs.data(), p.size,  outputs, coef.data() + task * p.size * outputs,
          outputs,   p.length,    p.dtype, stream,  static_cast<float*>(scratch.data())};
      TENFOLD_ISA_CALL(mix_rows, rows);
    }
  });
}

Tensor fuse_heads_op(Tensor w_in, Tensor omega, Tensor groups) {
  constexpr auto op = "fuse_heads";
  check_fuse_heads(op, w_in, omega, groups);
  const Problem p = read_problem(op, w_in, groups);
  const Tensor w = with_contiguous_rows(w_in);
  const Tensor out = new_output(w, {p.groups, p.size, p.dims, p.length}, w.scalar_type());
  mix_heads(p, w, out, coefficients_of(p, omega, Order::inputs_by_heads), p.size);
  return out;
}

Tensor collapse_heads_op(Tensor w_in, Tensor omega, Tensor groups) {
  constexpr auto op = "collapse_heads";
  check_fuse_heads(op, w_in, omega, groups);
  const Problem p = read_problem(op, w_in, groups);
  const Tensor w = with_contiguous_rows(w_in);
  const Tensor out = new_output(w, {p.groups, p.dims, p.length}, w.scalar_type());
  mix_heads(p, w, out, mean_coefficients_of(p, omega), 1);
  return out;
}

struct Gradients {
  Tensor dw;                // [H, d, m], or empty
  std::vector<float> dots;  // [N, d, h, j], or empty
};

void backward_heads(const Problem& p, const Tensor& dout, const Tensor& w, const Tensor& omega,
                    Gradients& to) {
  const auto coef = coefficients_of(p, omega, Order::heads_by_inputs);
  const int64_t pairs = p.size * p.size, size = dtype_size(p.dtype);
  const bool dw = to.dw.dim() == 3, stream = dw && can_stream(to.dw, p.dtype);
  const Rows grads(dout, size), weights(w, size), outs(dw ? to.dw : w, size);
  parallel_for(p.groups * p.dims, 2 * micros_per_task(p, p.size), [&](int64_t begin, int64_t end) {
    const Scratch scratch(backward_scratch(p.size) * 4);
    std::vector<const void*> grad(p.size), weight(p.size);
    std::vector<void*> out(p.size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.dims, i = task % p.dims;
      for (int64_t h = 0; h < p.size; ++h) {
        const int64_t head = p.head[n * p.size + h];
        grad[h] = grads.at(n, h, i);
        weight[h] = weights.at(0, head, i);
        out[h] = outs.at(0, head, i);
      }
      const FuseBackwardRows rows{grad.data(),
                                  weight.data(),
                                  dw ? out.data() : nullptr,
                                  p.size,
                                  coef.data() + task * pairs,
                                  to.dots.empty() ? nullptr : to.dots.data() + task * pairs,
                                  p.length,
                                  p.dtype,
                                  stream,
                                  static_cast<float*>(scratch.data())};
      TENFOLD_ISA_CALL(fuse_backward_rows, rows);
    }
  });
}

std::tuple<Tensor, Tensor> fuse_heads_backward_op(Tensor dout_in, Tensor w_in, Tensor omega,
                                                  Tensor groups, bool need_dw, bool need_domega) {
  constexpr auto op = "fuse_heads_backward";
  check_fuse_heads_backward(op, dout_in, w_in, omega, groups);
  const Problem p = read_problem(op, w_in, groups);
  const Tensor w = with_contiguous_rows(w_in), dout = with_contiguous_rows(dout_in);
  const int64_t heads = w.sizes()[0], pairs = p.size * p.size;
  Gradients to{need_dw ? new_output(w, {heads, p.dims, p.length}, w.scalar_type())
                       : new_output(w, {0}, w.scalar_type()),
               std::vector<float>(need_domega ? p.groups * p.dims * pairs : 0)};
  const Tensor domega = need_domega
                            ? new_output(w, {p.groups, p.size, p.size, p.dims}, ScalarType::Float)
                            : new_output(w, {0}, ScalarType::Float);
  if (need_dw || need_domega) backward_heads(p, dout, w, omega, to);
  float* out = need_domega ? data_as<float>(domega) : nullptr;
  if (need_domega)
    for_dim_blocks(p, [&](int64_t n, int64_t first, int64_t last) {
      for (int64_t at = 0; at < pairs; ++at)
        for (int64_t i = first; i < last; ++i)
          out[(n * pairs + at) * p.dims + i] = to.dots[(n * p.dims + i) * pairs + at];
    });
  return {to.dw, domega};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("fuse_heads", TORCH_BOX(&tenfold::cpu::fuse_heads_op));
  m.impl("fuse_heads_backward", TORCH_BOX(&tenfold::cpu::fuse_heads_backward_op));
  m.impl("collapse_heads", TORCH_BOX(&tenfold::cpu::collapse_heads_op));
}
