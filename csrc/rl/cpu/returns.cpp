// SPDX-License-Identifier: Apache-2.0
// CPU registration of macro_pool (with backward), macro_gae, gae, ma_ppo_prepare and
// macro_segment_check: a row per task.
#include "rl/returns.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "rl/cpu/rows.h"
#include "rl/returns_ops.h"

namespace tenfold::cpu {
namespace {

constexpr double kMicrosPerToken = 0.002;

using Doubles = std::vector<double>;

// Place of every token in its segment, and the segments' lengths.
void read_places(const ValidTokens& tokens, int32_t* place, int32_t* length) {
  int32_t before = -1, count = 0;
  for (int64_t q = 0; q < tokens.count(); ++q) {
    const int32_t s = tokens.segments()[q];
    count = s == before ? count + 1 : 0;
    place[q] = count, length[s] = count + 1, before = s;
  }
}

bool needs_places(PoolBy by) {
  return by == PoolBy::unit || by == PoolBy::position || by == PoolBy::position_early;
}

// Sums of tokens over their segments; what a thread reuses from row to row.
class Pool {
 public:
  explicit Pool(int64_t longest)
      : a(longest),
        b(longest),
        sum_a(longest),
        sum_b(longest),
        length(longest),
        place_(longest),
        ends_(longest + 16) {}

  Doubles a, b;          // of tokens; b is left out if `two` is false
  Doubles sum_a, sum_b;  // of segments, 0 where there is none
  std::vector<int32_t> length;

  // Sums of the first `segments` segments; what a and b hold is lost.
  void run(const ValidTokens& tokens, int64_t segments, bool two) {
    const int32_t* const seg = tokens.segments();
    const int64_t n = tokens.count();
    double* const second = two ? b.data() : nullptr;
    if (tokens.consecutive()) {
      found_ = TENFOLD_ISA_CALL(consecutive_sums, seg, n, a.data(), second, ends_.data(),
                                sum_a.data(), sum_b.data(), length.data());
      return fill(found_, segments, two);
    }
    fill(0, segments, two);
    TENFOLD_ISA_CALL(segment_sums, seg, n, a.data(), second, sum_a.data(), sum_b.data(),
                     length.data());
  }

  // After `run`: to_x[q] = x of the segment of token q.
  template <class T>
  void spread(const ValidTokens& tokens, const T* x, const T* y, T* to_x, T* to_y) const {
    if (tokens.consecutive())
      return (void)TENFOLD_ISA_CALL(spread_runs, ends_.data(), found_, x, y, to_x, to_y);
    TENFOLD_ISA_CALL(spread, tokens.segments(), tokens.count(), x, y, to_x, to_y);
  }

  void places(const ValidTokens& tokens) { read_places(tokens, place_.data(), length.data()); }

  // Before `run`, after `places` where those are needed: shares of tokens.
  void weigh(PoolBy by, const ValidTokens& tokens, Doubles* x) const {
    if (!needs_places(by)) return;
    for (int64_t q = 0; q < tokens.count(); ++q) {
      const double w = pool_share(by, place_[q], length[tokens.segments()[q]]);
      (*x)[q] = w == 0.0 ? 0.0 : w * (*x)[q];
    }
  }
  // After `run`: norms of segments.
  void norm(PoolBy by, int64_t segments, Doubles* sum) const {
    if (by == PoolBy::sum || by == PoolBy::unit) return;
    if (by == PoolBy::equal)
      return (void)TENFOLD_ISA_CALL(divide, length.data(), segments, sum->data());
    for (int64_t t = 0; t < segments; ++t)
      if (length[t] > 1) (*sum)[t] *= pool_norm(by, length[t]);
  }

  int32_t place(int64_t q) const { return place_[q]; }

 private:
  void fill(int64_t begin, int64_t end, bool two) {
    for (int64_t t = begin; t < end; ++t) sum_a[t] = 0.0, length[t] = 0;
    for (int64_t t = begin; t < end && two; ++t) sum_b[t] = 0.0;
  }

  std::vector<int32_t> place_;
  std::vector<uint32_t> ends_;
  int64_t found_ = 0;
};

Tensor macro_pool_op(Tensor x, Tensor seg, int64_t count, std::string weight,
                     OptTensor cu_seqlens) {
  const PoolCall call = check_pool(x, seg, count, weight, cu_seqlens);
  with_real(call.x, [&]<class T>() {
    const PoolParams<T> p = call.params<T>();
    parallel_for(p.seg.rows.count, kMicrosPerToken * static_cast<double>(p.seg.rows.width + 16),
                 [&](int64_t begin, int64_t end) {
                   ValidTokens tokens(p.seg.rows.width);
                   Pool pool(p.seg.rows.width);
                   std::vector<T> memory;
                   for (int64_t row = begin; row < end; ++row) {
                     const Span span = p.seg.rows[row];
                     const SegmentRow ids = p.seg[row];
                     tokens.read(ids, span.width);
                     TENFOLD_ISA_CALL(widen, tokens.pick(p.x + span.begin, &memory), tokens.count(),
                                      pool.a.data());
                     if (needs_places(p.by)) pool.places(tokens);
                     pool.weigh(p.by, tokens, &pool.a);
                     pool.run(tokens, ids.limit, false);
                     pool.norm(p.by, ids.limit, &pool.sum_a);
                     T* const to = p.out + row * p.count;
                     for (int64_t t = 0; t < ids.limit; ++t) to[t] = static_cast<T>(pool.sum_a[t]);
                     std::fill(to + ids.limit, to + p.count, T{0});
                   }
                 });
  });
  return call.out;
}

Tensor macro_pool_backward_op(Tensor grad, Tensor seg, int64_t count, std::string weight,
                              OptTensor cu_seqlens) {
  const PoolCall call = check_pool_backward(grad, seg, count, weight, cu_seqlens);
  with_real(call.x, [&]<class T>() {
    const PoolParams<T> p = call.params<T>();
    over_rows(p.seg, kMicrosPerToken,
              [&](int64_t row, const Span& span, const ValidTokens& tokens) {
                std::vector<int32_t> place(tokens.count()), length(span.width);
                std::vector<T> memory;
                read_places(tokens, place.data(), length.data());
                const T* const from = p.x + row * p.count;
                T* const to = tokens.target(p.out + span.begin, &memory);
                for (int64_t q = 0; q < tokens.count(); ++q) {
                  const int32_t s = tokens.segments()[q], l = length[s];
                  const double w = pool_share(p.by, place[q], l) * pool_norm(p.by, l);
                  to[q] = w == 0.0 ? T{0} : static_cast<T>(w * static_cast<double>(from[s]));
                }
                tokens.place(to, p.out + span.begin);
              });
  });
  return call.out;
}

// gamma ^ length of every macro action.
void discounts(const GaeRule& rule, const int32_t* length, int64_t n, Doubles* g) {
  g->resize(n);
  for (int64_t t = 0; t < n; ++t) (*g)[t] = std::pow(rule.gamma, static_cast<double>(length[t]));
}

// What gae_steps takes for rule.per_token.
template <class T>
void gae_row(const GaeParams<T>& p, int64_t row, ValidTokens* tokens, Doubles* work, Doubles* g,
             std::vector<T> (&memory)[4]) {
  const Span span = p.rows[row];
  const int64_t at = span.begin;
  const double bootstrap = p.bootstrap != nullptr ? static_cast<double>(p.bootstrap[row]) : 0.0;
  if (!p.masked) {
    const int64_t n = count_at(p.nseg, row, span.width);
    if (p.length != nullptr) discounts(p.rule, p.length + at, n, g);
    TENFOLD_ISA_CALL(gae_steps, p.value + at, p.reward + at, n, p.rule,
                     p.length != nullptr ? g->data() : nullptr, bootstrap, work->data(), p.adv + at,
                     p.ret + at);
    std::fill(p.adv + at + n, p.adv + at + span.width, T{0});
    std::fill(p.ret + at + n, p.ret + at + span.width, T{0});
    return;
  }
  tokens->read_mask(p.mask + at, span.width);
  const T *value = tokens->pick(p.value + at, &memory[0]),
          *reward = tokens->pick(p.reward + at, &memory[1]);
  T *adv = tokens->target(p.adv + at, &memory[2]), *ret = tokens->target(p.ret + at, &memory[3]);
  TENFOLD_ISA_CALL(gae_steps, value, reward, tokens->count(), p.rule, nullptr, bootstrap,
                   work->data(), adv, ret);
  tokens->place(adv, p.adv + at), tokens->place(ret, p.ret + at);
}

std::tuple<Tensor, Tensor> run_gae(const GaeCall& call) {
  with_real(call.value, [&]<class T>() {
    const GaeParams<T> p = call.params<T>();
    parallel_for(p.rows.count, kMicrosPerToken * static_cast<double>(p.rows.width + 16),
                 [&](int64_t begin, int64_t end) {
                   ValidTokens tokens(p.masked ? p.rows.width : 0);
                   Doubles work(p.rows.width + 1), g;
                   std::vector<T> memory[4];
                   for (int64_t row = begin; row < end; ++row)
                     gae_row(p, row, &tokens, &work, &g, memory);
                 });
  });
  return {call.adv, call.ret};
}

std::tuple<Tensor, Tensor> macro_gae_op(Tensor value, Tensor reward, Tensor nseg, OptTensor length,
                                        double gamma, double lam, OptTensor bootstrap) {
  return run_gae(check_macro_gae(value, reward, nseg, length, gamma, lam, bootstrap));
}

std::tuple<Tensor, Tensor> gae_op(Tensor value, Tensor reward, Tensor mask, double gamma,
                                  double lam, OptTensor bootstrap, OptTensor cu_seqlens) {
  return run_gae(check_gae(value, reward, mask, gamma, lam, bootstrap, cu_seqlens));
}

// The rows of ma_ppo_prepare that a thread works on.
template <class T>
class Prepare {
 public:
  explicit Prepare(const PrepareParams<T>& p)
      : p_(p), tokens_(p.seg.rows.width), pool_(p.seg.rows.width), work_(p.seg.rows.width + 1) {
    if (!p.rule.gae.per_token || p.rule.reduce_sigma) return;
    power_.resize(p.seg.rows.width);
    for (size_t i = 0; i < power_.size(); ++i)
      power_[i] = std::pow(p.rule.gae.gamma, static_cast<double>(i));
  }

  void run(int64_t row) {
    const Span span = p_.seg.rows[row];
    const int64_t at = span.begin, width = span.width;
    tokens_.read(p_.seg[row], width);
    const int64_t count = tokens_.count(), n = count_at(p_.nseg, row, width);
    const double kl = read_tokens(at);
    pool(row, n);
    const GaeRule& rule = p_.rule.gae;
    if (rule.per_token) discounts(rule, pool_.length.data(), n, &g_);
    T *const adv_m = p_.adv_m + at, *const ret_m = p_.ret_m + at;
    TENFOLD_ISA_CALL(gae_steps, pool_.sum_b.data(), pool_.sum_a.data(), n, rule,
                     rule.per_token ? g_.data() : nullptr,
                     p_.bootstrap != nullptr ? static_cast<double>(p_.bootstrap[row]) : 0.0,
                     work_.data(), adv_m, ret_m);
    std::fill(adv_m + n, adv_m + width, T{0});
    std::fill(ret_m + n, ret_m + width, T{0});
    T *const adv = tokens_.target(p_.adv + at, &memory_[0]), *const ret = tokens_.target(
                                                                 p_.ret + at, &memory_[1]);
    pool_.spread(tokens_, adv_m, ret_m, adv, ret);
    tokens_.place(adv, p_.adv + at), tokens_.place(ret, p_.ret + at);
    p_.kl_row[row] = static_cast<T>(count > 0 ? kl / static_cast<double>(count) : 0.0);
  }

 private:
  // Token rewards into pool_.a and values into pool_.b; the sum of kl.
  double read_tokens(int64_t at) {
    const T *old = tokens_.pick(p_.old + at, &memory_[0]),
            *ref = tokens_.pick(p_.ref + at, &memory_[1]);
    const double kl = TENFOLD_ISA_CALL(kl_terms, old, ref, tokens_.count(), p_.rule.kl,
                                       -p_.rule.beta, pool_.a.data());
    TENFOLD_ISA_CALL(widen, tokens_.pick(p_.value + at, &memory_[0]), tokens_.count(),
                     pool_.b.data());
    return kl;
  }

  // Macro rewards into pool_.sum_a and values into pool_.sum_b.
  void pool(int64_t row, int64_t n) {
    const PrepareRule& rule = p_.rule;
    const double score =
        std::clamp<double>(static_cast<double>(p_.score[row]), -rule.score_clip, rule.score_clip);
    const int64_t count = tokens_.count();
    if (needs_places(rule.sigma) || !power_.empty()) pool_.places(tokens_);
    if (rule.reduce_sigma) {
      if (count > 0) pool_.a[count - 1] += score;
      pool_.weigh(rule.sigma, tokens_, &pool_.a);
    } else if (!power_.empty()) {
      for (int64_t q = 0; q < count; ++q) pool_.a[q] *= power_[pool_.place(q)];
    }
    pool_.weigh(rule.sigma, tokens_, &pool_.b);
    pool_.run(tokens_, n, true);
    pool_.norm(rule.sigma, n, &pool_.sum_b);
    if (rule.reduce_sigma) {
      pool_.norm(rule.sigma, n, &pool_.sum_a);
    } else if (n > 0) {
      pool_.sum_a[n - 1] += score;
    }
  }

  const PrepareParams<T>& p_;
  ValidTokens tokens_;
  Pool pool_;
  Doubles work_, g_, power_;
  std::vector<T> memory_[2];
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ma_ppo_prepare_op(
    Tensor logp_old, Tensor logp_ref, Tensor value_old, Tensor score, Tensor seg, Tensor nseg,
    double beta, double gamma, double lam, double score_clip, std::string sigma,
    std::string reward_reduce, std::string discount, std::string kl, OptTensor bootstrap,
    OptTensor cu_seqlens) {
  const PrepareCall call = check_prepare(
      logp_old, logp_ref, value_old, score, seg, nseg,
      to_prepare_rule(beta, gamma, lam, score_clip, sigma, reward_reduce, discount, kl), bootstrap,
      cu_seqlens);
  with_real(call.old, [&]<class T>() {
    const PrepareParams<T> p = call.params<T>();
    parallel_for(p.seg.rows.count, kMicrosPerToken * static_cast<double>(p.seg.rows.width + 16),
                 [&](int64_t begin, int64_t end) {
                   Prepare<T> prepare(p);
                   for (int64_t row = begin; row < end; ++row) prepare.run(row);
                 });
  });
  return {call.adv, call.ret, call.adv_m, call.ret_m, call.kl_row};
}

bool is_wrong(const CheckParams& p, int64_t row, ValidTokens* tokens) {
  const Span span = p.rows[row];
  const int64_t found = numbered_segments(p.seg.from(span.begin), span.width, tokens);
  return found < 0 || found > p.limit || (p.nseg.data != nullptr && p.nseg[row] != found);
}

Tensor macro_segment_check_op(Tensor seg, OptTensor nseg, int64_t limit, OptTensor cu_seqlens) {
  const CheckCall call = check_segment_check(seg, nseg, limit, cu_seqlens);
  parallel_for(call.p.rows.count, 0.0004 * static_cast<double>(call.p.rows.width + 16),
               [&](int64_t begin, int64_t end) {
                 ValidTokens tokens(call.p.rows.width);
                 for (int64_t row = begin; row < end; ++row)
                   call.p.wrong[row] = is_wrong(call.p, row, &tokens);
               });
  return call.wrong;
}

}  // namespace
}  // namespace tenfold::cpu

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  m.impl("macro_pool", TORCH_BOX(&tenfold::cpu::macro_pool_op));
  m.impl("macro_pool_backward", TORCH_BOX(&tenfold::cpu::macro_pool_backward_op));
  m.impl("macro_gae", TORCH_BOX(&tenfold::cpu::macro_gae_op));
  m.impl("gae", TORCH_BOX(&tenfold::cpu::gae_op));
  m.impl("ma_ppo_prepare", TORCH_BOX(&tenfold::cpu::ma_ppo_prepare_op));
  m.impl("macro_segment_check", TORCH_BOX(&tenfold::cpu::macro_segment_check_op));
}
