// SPDX-License-Identifier: Apache-2.0
// CPU registration of markov_scan and markov_onestep: a task is a block of lanes q, in the forward
// pass of some of the runs, in the backward of all of them, so that it owns its sums. What a task
// reads again and again, its lanes of the factors, it packs first where that pays: rows of a wide
// matrix lie a power of two apart, and would share a few sets of the cache.
#include "influence/markov.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "core/parallel.h"
#include "core/scratch.h"
#include "influence/cpu/row_ids.h"
#include "influence/cpu/stretches.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerLane = 4e-5;  // to add a row of factors
constexpr int64_t kLeastLanes = 16, kCacheBytes = 1 << 20;
constexpr int64_t kMostPacked = 4 << 20;  // bytes: beyond, a copy is not in the cache either

// What all tasks share, and how they are cut.
template <class T>
struct Plan {
  const MarkovCall& c;
  MarkovSteps<T> steps;
  int64_t lanes = kMarkovLanes, blocks;
  double micros;

  // numbers: what a task wants in its cache, for each of its lanes.
  Plan(const MarkovCall& c, const Past& past, const RowIds& ids,
       const std::vector<int64_t>& lengths, int64_t numbers)
      : c(c) {
    steps.factors = static_cast<const T*>(c.factors.data_ptr());
    steps.plane = c.factors.strides()[0], steps.row = c.factors.strides()[1];
    steps.lags = c.lags, steps.ids = ids.data();
    steps.steps = c.steps, steps.batch = c.batch, steps.tests = c.tests;
    steps.lengths = c.lengths ? lengths.data() : nullptr;
    steps.residual = c.residual, steps.mean = c.mean, steps.free_running = false;
    steps.y = pointer_or_null<Real<T>>(past.y);
    steps.y_run = stride_of(past.y, 0), steps.y_step = stride_of(past.y, 1);
    steps.y0 = pointer_or_null<Real<T>>(past.y0);
    steps.y0_run = stride_of(past.y0, 0), steps.y0_lag = stride_of(past.y0, 1);
    steps.mask = pointer_or_null<uint8_t>(past.mask);
    steps.mask_run = stride_of(past.mask, 0), steps.mask_step = stride_of(past.mask, 1);
    const int64_t threads = torch::stable::get_num_threads();
    const auto fits = [&] {
      return numbers * lanes * static_cast<int64_t>(sizeof(Real<T>)) <= kCacheBytes;
    };
    const auto busy = [&] { return ceil_div(c.tests, lanes) >= threads; };
    while (lanes > kLeastLanes && (lanes / 2 >= c.tests || !busy() || !fits())) lanes /= 2;
    blocks = ceil_div(c.tests, lanes);
    micros =
        kMicrosPerLane * static_cast<double>(entries() * planes()) * static_cast<double>(c.tests);
  }

  int64_t planes() const { return c.lags + 1; }
  int64_t entries() const { return c.runs * c.steps * c.batch; }
  // A task's lanes of some planes of the factors.
  int64_t slice(int64_t some) const { return c.rows * some * lanes; }
  // Worth a copy for that many entries of order.
  bool packs(int64_t some, int64_t entries) const {
    return blocks > 1 && entries >= c.rows &&
           slice(some) * static_cast<int64_t>(sizeof(Real<T>)) <= kMostPacked;
  }
  int64_t width(int64_t block) const { return std::min(lanes, c.tests - block * lanes); }

  // The steps of a block of lanes.
  MarkovSteps<T> of(int64_t block) const {
    MarkovSteps<T> s = steps;
    const int64_t at = block * lanes;
    s.factors += at;
    if (s.y != nullptr) s.y += at;
    if (s.y0 != nullptr) s.y0 += at;
    if (s.mask != nullptr) s.mask += at;
    return s;
  }
  // Copies its factors to [M][some planes][lanes].
  void pack(MarkovSteps<T>* s, int64_t some, int64_t width, T* to) const {
    const T* const from = s->factors;
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t plane = 0; plane < some; ++plane)
        std::memcpy(to + (i * some + plane) * lanes, from + plane * s->plane + i * s->row,
                    static_cast<size_t>(width) * sizeof(T));
    s->factors = to, s->plane = lanes, s->row = some * lanes;
  }
};

// Memory of a task's thread.
using Held = std::shared_ptr<Scratch>;

template <class T>
void run_forward(const Plan<T>& plan, Real<T>* out, bool free_running) {
  const MarkovCall& c = plan.c;
  const int64_t threads = torch::stable::get_num_threads();
  // Runs are cut only where blocks of lanes do not keep all threads busy.
  const int64_t cuts = std::clamp<int64_t>(ceil_div(4 * threads, std::max<int64_t>(plan.blocks, 1)),
                                           1, std::max<int64_t>(c.runs, 1));
  const Parts runs{c.runs, 1, cuts};
  const bool packs = plan.packs(plan.planes(), plan.entries() / cuts);
  for_each_task(plan.blocks * cuts, plan.micros, [&] {
    const Held held = std::make_shared<Scratch>(
        packs ? plan.slice(plan.planes()) * static_cast<int64_t>(sizeof(T)) : int64_t{64});
    return [&, held](int64_t task) {
      const int64_t block = task / cuts, part = task % cuts;
      MarkovSteps<T> s = plan.of(block);
      if (packs) plan.pack(&s, plan.planes(), plan.width(block), static_cast<T*>(held->data()));
      s.free_running = free_running;
      Real<T>* const to = out + block * plan.lanes;
      if (free_running) s.y = to, s.y_run = c.steps * c.tests, s.y_step = c.tests;
      const MarkovForward<T> p{s, to};
      TENFOLD_ISA_CALL(markov_forward, p, runs.begin(part), runs.begin(part + 1),
                       plan.width(block));
    };
  });
}

struct Gradients {
  Tensor factors;
  OptTensor y, y0;
};

// Where a block's gradients of factors go: to the result, or if there are several stretches by way
// of sums [planes][M][lanes].
template <class T>
class Sums {
 public:
  Sums(const Plan<T>& plan, const Tensor& grad, bool apart)
      : plan_(plan), grad_(static_cast<T*>(grad.data_ptr())), apart_(apart) {}

  int64_t room() const { return apart_ ? plan_.slice(plan_.planes()) : 0; }

  void start(MarkovBackward<T>* p, int64_t block, Real<T>* room) const {
    const MarkovCall& c = plan_.c;
    if (apart_) {
      std::fill_n(room, this->room(), Real<T>{0});
      p->sums = room, p->out_plane = c.rows * plan_.lanes, p->out_row = plan_.lanes;
    } else {
      p->out = grad_ + block * plan_.lanes;
      p->out_plane = c.rows * c.tests, p->out_row = c.tests;
    }
  }
  void finish(const MarkovBackward<T>& p, int64_t block) const {
    if (!apart_) return;
    const int64_t width = plan_.width(block);
    for (int64_t i = 0; i < plan_.planes() * plan_.c.rows; ++i) {
      const Real<T>* const from = p.sums + i * plan_.lanes;
      T* const to = grad_ + i * plan_.c.tests + block * plan_.lanes;
      if constexpr (sizeof(T) == 2) {
        TENFOLD_ISA_CALL(round_row, from, width, to);
      } else {
        std::copy_n(from, width, to);
      }
    }
  }

 private:
  const Plan<T>& plan_;
  T* grad_;
  bool apart_;
};

template <class T>
void run_backward(const MarkovCall& c, const Past& past, const RowIds& ids,
                  const std::vector<int64_t>& lengths, const Tensor& grad, const Gradients& out,
                  bool free_running) {
  if (out.y0 && c.steps == 0) std::fill_n(data_as<Real<T>>(*out.y0), out.y0->numel(), Real<T>{0});
  const Stretches stretches(c, ids.data(), lengths);
  const int64_t planes = c.lags + 1;
  const bool apart = stretches.count() > 1;
  const int64_t numbers = c.rows * c.lags + planes * (stretches.longest() + (apart ? c.rows : 0));
  const Plan<T> plan(c, past, ids, lengths, numbers);
  const bool packs = plan.packs(c.lags, plan.entries());
  const Sums<T> sums(plan, out.factors, apart);
  const int64_t ring = c.lags * kMarkovLanes, plane = stretches.longest() * plan.lanes;
  const int64_t reals = ring + planes * plane + sums.room();
  const int64_t bytes = reals * static_cast<int64_t>(sizeof(Real<T>)) +
                        (packs ? plan.slice(c.lags) * static_cast<int64_t>(sizeof(T)) : 0);
  for_each_task(plan.blocks, 3 * plan.micros, [&] {
    const Held held = std::make_shared<Scratch>(bytes);
    return [&, held](int64_t block) {
      auto* const room = static_cast<Real<T>*>(held->data());
      MarkovBackward<T> p{};
      p.s = plan.of(block);
      const int64_t at = block * plan.lanes, width = plan.width(block);
      if (packs) plan.pack(&p.s, c.lags, width, reinterpret_cast<T*>(room + reals));
      p.s.free_running = free_running;
      p.grad = static_cast<const Real<T>*>(grad.data_ptr()) + at;
      p.grad_run = grad.strides()[0], p.grad_step = grad.strides()[1];
      p.ring = room, p.shares = room + ring;
      p.shares_plane = plane, p.shares_row = plan.lanes;
      if (out.y) p.grad_y = data_as<Real<T>>(*out.y) + at;
      if (out.y0) p.grad_y0 = data_as<Real<T>>(*out.y0) + at;
      sums.start(&p, block, room + ring + planes * plane);
      for (int64_t i = stretches.count() - 1; i >= 0; --i)
        TENFOLD_ISA_CALL(markov_backward, p, stretches[i], width);
      sums.finish(p, block);
    };
  });
}

Tensor markov_scan_op(Tensor factors, Tensor order, Tensor y0, bool residual, OptTensor lengths,
                      std::string reduction) {
  constexpr auto kOp = "markov_scan";
  const MarkovCall c = check_markov(kOp, factors, order, residual, lengths, reduction);
  const Past past = check_scan_past(kOp, c, y0, std::nullopt);
  const RowIds ids(kOp, "order", c.order, -1, c.rows);
  const std::vector<int64_t> lengths_of = check_lengths(kOp, c.lengths, c.steps);
  const Tensor out = new_states(c);
  with_factors(factors, [&]<class T>() {
    run_forward<T>(Plan<T>(c, past, ids, lengths_of, c.rows * (c.lags + 1)), data_as<Real<T>>(out),
                   true);
  });
  return out;
}

std::tuple<Tensor, Tensor> markov_scan_backward_op(Tensor grad, Tensor factors, Tensor order,
                                                   Tensor y0, Tensor pred, bool residual,
                                                   OptTensor lengths, std::string reduction) {
  constexpr auto kOp = "markov_scan_backward";
  const MarkovCall c = check_markov(kOp, factors, order, residual, lengths, reduction);
  const Past past = check_scan_past(kOp, c, y0, pred);
  const Tensor from = check_grad(kOp, c, grad);
  const RowIds ids(kOp, "order", c.order, -1, c.rows);
  const std::vector<int64_t> lengths_of = check_lengths(kOp, c.lengths, c.steps);
  const Gradients out{like_factors(c), std::nullopt, new_history(c)};
  with_factors(factors,
               [&]<class T>() { run_backward<T>(c, past, ids, lengths_of, from, out, true); });
  return {out.factors, *out.y0};
}

Tensor markov_onestep_op(Tensor factors, Tensor order, Tensor y, bool residual, OptTensor y0,
                         OptTensor mask, OptTensor lengths, std::string reduction) {
  constexpr auto kOp = "markov_onestep";
  const MarkovCall c = check_markov(kOp, factors, order, residual, lengths, reduction);
  const Past past = check_recorded(kOp, c, y, y0, mask);
  const RowIds ids(kOp, "order", c.order, -1, c.rows);
  const std::vector<int64_t> lengths_of = check_lengths(kOp, c.lengths, c.steps);
  const Tensor out = new_states(c);
  with_factors(factors, [&]<class T>() {
    run_forward<T>(Plan<T>(c, past, ids, lengths_of, c.rows * (c.lags + 1)), data_as<Real<T>>(out),
                   false);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> markov_onestep_backward_op(Tensor grad, Tensor factors,
                                                              Tensor order, Tensor y, bool residual,
                                                              OptTensor y0, bool of_past,
                                                              OptTensor mask, OptTensor lengths,
                                                              std::string reduction) {
  constexpr auto kOp = "markov_onestep_backward";
  const MarkovCall c = check_markov(kOp, factors, order, residual, lengths, reduction);
  const Past past = check_recorded(kOp, c, y, y0, mask);
  const Tensor from = check_grad(kOp, c, grad);
  const RowIds ids(kOp, "order", c.order, -1, c.rows);
  const std::vector<int64_t> lengths_of = check_lengths(kOp, c.lengths, c.steps);
  Gradients out{like_factors(c), std::nullopt, std::nullopt};
  if (of_past) out.y = new_states(c);
  if (of_past && y0) out.y0 = new_history(c);
  with_factors(factors,
               [&]<class T>() { run_backward<T>(c, past, ids, lengths_of, from, out, false); });
  return {out.factors, out.y ? *out.y : nothing(c), out.y0 ? *out.y0 : nothing(c)};
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("markov_scan", TORCH_BOX(&tenfold::cpu::markov_scan_op));
  m.impl("markov_scan_backward", TORCH_BOX(&tenfold::cpu::markov_scan_backward_op));
  m.impl("markov_onestep", TORCH_BOX(&tenfold::cpu::markov_onestep_op));
  m.impl("markov_onestep_backward", TORCH_BOX(&tenfold::cpu::markov_onestep_backward_op));
}
