// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of PPO's losses share: checked calls, with their outputs.
#pragma once

#include <string>

#include "rl/losses.h"
#include "rl/rows_ops.h"

namespace tenfold {

// Of both losses. slope and scale: only of the forms that a backward follows.
struct LossOut {
  MeanRule mean;
  Tensor loss, stats;
  OptTensor slope;  // d term / d input, as the input
  OptTensor scale;  // float64 [B]: of a row's terms in the loss

  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {loss, stats, *slope, *scale}; }
};

struct PolicyCall {
  Segments seg;
  Tensor now, old, adv;
  PolicyRule rule;
  bool validate;  // segments are looked at, on the CPU
  LossOut out;

  template <class T>
  PolicyParams<T> params() const {
    return {seg.rows(),
            data_as<T>(now),
            data_as<T>(old),
            data_as<T>(adv),
            rule,
            out.slope ? data_as<T>(*out.slope) : nullptr};
  }
};

struct ValueCall {
  Layout layout;
  Tensor mask, now, old, ret;
  double clip;
  LossOut out;

  template <class T>
  ValueParams<T> params() const {
    return {layout.rows,
            static_cast<const uint8_t*>(mask.data_ptr()),
            data_as<T>(now),
            data_as<T>(old),
            data_as<T>(ret),
            clip,
            out.slope ? data_as<T>(*out.slope) : nullptr};
  }
};

struct SlopeCall {
  Layout layout;
  Tensor grad, slope, scale, out;

  template <class T>
  SlopeParams<T> params() const {
    return {layout.rows, data_as<T>(slope), data_as<T>(grad), data_as<double>(scale),
            data_as<T>(out)};
  }
};

SlopeCall check_slope(const Tensor& grad, const Tensor& slope, const Tensor& scale,
                      const OptTensor& cu_seqlens);

PolicyCall check_policy(bool with_slope, const Tensor& logp_new, const Tensor& logp_old,
                        const Tensor& adv, const Tensor& seg, double eps_lo, double eps_hi,
                        const std::string& ratio, const std::string& agg, double denom,
                        const std::string& weight, const OptTensor& cu_seqlens, bool validate);

ValueCall check_value(bool with_slope, const Tensor& v_new, const Tensor& v_old, const Tensor& ret,
                      const Tensor& mask, double clip, const std::string& agg, double denom,
                      const OptTensor& cu_seqlens);

// The ops, with policy(call), value(call) and slope(call) of a backend.
template <auto kPolicy, auto kValue, auto kSlope>
struct LossOps {
  using Loss = std::tuple<Tensor, Tensor>;
  using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Loss policy(Tensor now, Tensor old, Tensor adv, Tensor seg, double lo, double hi,
                     std::string ratio, std::string agg, double denom, std::string weight,
                     OptTensor cu, bool validate) {
    const PolicyCall call =
        check_policy(false, now, old, adv, seg, lo, hi, ratio, agg, denom, weight, cu, validate);
    kPolicy(call);
    return {call.out.loss, call.out.stats};
  }
  static Forward policy_forward(Tensor now, Tensor old, Tensor adv, Tensor seg, double lo,
                                double hi, std::string ratio, std::string agg, double denom,
                                std::string weight, OptTensor cu, bool validate) {
    const PolicyCall call =
        check_policy(true, now, old, adv, seg, lo, hi, ratio, agg, denom, weight, cu, validate);
    kPolicy(call);
    return call.out.all();
  }
  static Loss value(Tensor now, Tensor old, Tensor ret, Tensor mask, double clip, std::string agg,
                    double denom, OptTensor cu) {
    const ValueCall call = check_value(false, now, old, ret, mask, clip, agg, denom, cu);
    kValue(call);
    return {call.out.loss, call.out.stats};
  }
  static Forward value_forward(Tensor now, Tensor old, Tensor ret, Tensor mask, double clip,
                               std::string agg, double denom, OptTensor cu) {
    const ValueCall call = check_value(true, now, old, ret, mask, clip, agg, denom, cu);
    kValue(call);
    return call.out.all();
  }
  static Tensor backward(Tensor grad, Tensor slope, Tensor scale, OptTensor cu) {
    const SlopeCall call = check_slope(grad, slope, scale, cu);
    kSlope(call);
    return call.out;
  }
};

}  // namespace tenfold
