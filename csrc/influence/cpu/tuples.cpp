// SPDX-License-Identifier: Apache-2.0
// CPU registration of markov_onestep_tuples: a task is some tuples, in the backward pass some
// columns of a plane.
#include "influence/tuples.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "core/parallel.h"
#include "core/scratch.h"
#include "influence/cpu/row_ids.h"
#include "influence/tuples_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerLane = 4e-5;
constexpr int64_t kColumns = 64;  // of a task in the backward pass

template <class T>
TupleSteps<T> steps_of(const TupleCall& c, const RowIds& ids, const RowIds& tests) {
  return {static_cast<const T*>(c.h.data_ptr()),
          static_cast<const T*>(c.g.data_ptr()),
          c.h.strides()[0],
          c.h.strides()[1],
          c.g.strides()[0],
          c.g.strides()[1],
          c.lags,
          c.dim,
          c.batch,
          ids.data(),
          tests.data(),
          static_cast<const Real<T>*>(c.hist.data_ptr()),
          c.hist.strides()[0],
          c.residual,
          c.mean};
}

double micros_of_tuple(const TupleCall& c) {
  return kMicrosPerLane * static_cast<double>((c.batch + 2) * (c.lags + 1)) *
         static_cast<double>(c.dim + 16);
}

template <class T>
void run_forward(const TupleCall& c, const TupleForward<T>& p) {
  parallel_for(c.count, micros_of_tuple(c), [&](int64_t begin, int64_t end) {
    TENFOLD_ISA_CALL(tuples_forward, p, begin, end);
  });
}

// The sums of one feature tensor's gradient: in the result, or rounded to it by way of floats.
template <class T>
class RowSums {
 public:
  // null: not wanted.
  RowSums(T* grad, int64_t rows, int64_t dim) : grad_(grad), rows_(rows), dim_(dim) {}

  int64_t room() const { return kApart && grad_ != nullptr ? rows_ * kColumns : 0; }

  Real<T>* start(int64_t plane, int64_t at, int64_t lanes, Real<T>* room, int64_t* stride) const {
    if (grad_ == nullptr) return nullptr;
    *stride = kApart ? kColumns : dim_;
    Real<T>* sums = room;
    if constexpr (!kApart) sums = grad_ + plane * rows_ * dim_ + at;
    for (int64_t i = 0; i < rows_; ++i) std::fill_n(sums + i * *stride, lanes, Real<T>{0});
    return sums;
  }
  void finish(int64_t plane, int64_t at, int64_t lanes, const Real<T>* sums) const {
    if constexpr (kApart) {
      for (int64_t i = 0; sums != nullptr && i < rows_; ++i)
        TENFOLD_ISA_CALL(round_row, sums + i * kColumns, lanes,
                         grad_ + (plane * rows_ + i) * dim_ + at);
    }
  }

 private:
  static constexpr bool kApart = sizeof(T) == 2;
  T* grad_;
  int64_t rows_, dim_;
};

template <class T>
void run_backward(const TupleCall& c, const TupleSteps<T>& s, const Real<T>* grad, T* grad_h,
                  T* grad_g) {
  const RowSums<T> of_h(grad_h, c.rows, c.dim), of_g(grad_g, c.num_tests, c.dim);
  if (grad_h == nullptr && grad_g == nullptr) return;
  const int64_t blocks = ceil_div(c.dim, kColumns);
  const double micros = 2 * micros_of_tuple(c) * static_cast<double>(c.count) +
                        1e-4 * static_cast<double>((c.rows + c.num_tests) * c.dim);
  for_each_task((c.lags + 1) * blocks, micros, [&] {
    const int64_t floats = of_h.room() + of_g.room() + 16;
    const auto held = std::make_shared<Scratch>(floats * static_cast<int64_t>(sizeof(Real<T>)));
    return [&, held](int64_t task) {
      TupleBackward<T> p{};
      p.s = s, p.count = c.count, p.grad = grad;
      p.plane = task / blocks, p.at = task % blocks * kColumns;
      p.lanes = std::min(kColumns, c.dim - p.at);
      auto* const room = static_cast<Real<T>*>(held->data());
      p.h_sums = of_h.start(p.plane, p.at, p.lanes, room, &p.h_stride);
      p.g_sums = of_g.start(p.plane, p.at, p.lanes, room + of_h.room(), &p.g_stride);
      TENFOLD_ISA_CALL(tuples_backward, p);
      of_h.finish(p.plane, p.at, p.lanes, p.h_sums);
      of_g.finish(p.plane, p.at, p.lanes, p.g_sums);
    };
  });
}

Tensor markov_onestep_tuples_op(Tensor h, Tensor g, Tensor order_rows, Tensor test_rows,
                                Tensor hist, bool residual, std::string reduction) {
  constexpr auto kOp = "markov_onestep_tuples";
  const TupleCall c = check_tuples(kOp, h, g, order_rows, test_rows, hist, residual, reduction);
  const RowIds ids(kOp, "order_rows", c.ids, -1, c.rows);
  const RowIds tests(kOp, "test_rows", c.tests, 0, c.num_tests);
  const Tensor out = new_output(c.h, {c.count}, real_of(c.h));
  with_factors(c.h, [&]<class T>() {
    run_forward<T>(c, {steps_of<T>(c, ids, tests), data_as<Real<T>>(out), nullptr, nullptr});
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> markov_onestep_tuples_backward_op(
    Tensor grad, Tensor h, Tensor g, Tensor order_rows, Tensor test_rows, Tensor hist, bool of_h,
    bool of_g, bool of_hist, bool residual, std::string reduction) {
  constexpr auto kOp = "markov_onestep_tuples_backward";
  const TupleCall c = check_tuples(kOp, h, g, order_rows, test_rows, hist, residual, reduction);
  const Tensor from = as_contiguous(check_real(kOp, "grad", grad, "H", h, {c.count}, "[N]"));
  const RowIds ids(kOp, "order_rows", c.ids, -1, c.rows);
  const RowIds tests(kOp, "test_rows", c.tests, 0, c.num_tests);
  const ScalarType dtype = c.h.scalar_type();
  const auto nothing = [&](ScalarType t) { return new_output(c.h, {0}, t); };
  const Tensor grad_h = of_h ? new_output(c.h, {c.lags + 1, c.rows, c.dim}, dtype) : nothing(dtype);
  const Tensor grad_g =
      of_g ? new_output(c.h, {c.lags + 1, c.num_tests, c.dim}, dtype) : nothing(dtype);
  const Tensor grad_hist =
      of_hist ? new_output(c.h, {c.count, c.lags}, real_of(c.h)) : nothing(real_of(c.h));
  with_factors(c.h, [&]<class T>() {
    const TupleSteps<T> s = steps_of<T>(c, ids, tests);
    const auto* const upstream = data_as<Real<T>>(from);
    if (of_hist) run_forward<T>(c, {s, nullptr, upstream, data_as<Real<T>>(grad_hist)});
    run_backward<T>(c, s, upstream, of_h ? static_cast<T*>(grad_h.data_ptr()) : nullptr,
                    of_g ? static_cast<T*>(grad_g.data_ptr()) : nullptr);
  });
  return {grad_h, grad_g, grad_hist};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("markov_onestep_tuples", TORCH_BOX(&tenfold::cpu::markov_onestep_tuples_op));
  m.impl("markov_onestep_tuples_backward",
         TORCH_BOX(&tenfold::cpu::markov_onestep_tuples_backward_op));
}
