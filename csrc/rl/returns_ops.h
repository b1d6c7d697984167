// SPDX-License-Identifier: Apache-2.0
// What the CPU and CUDA registrations of macro_pool, macro_gae, gae, ma_ppo_prepare and
// macro_segment_check share: checked calls, with their outputs made.
#pragma once

#include <string>

#include "rl/returns.h"
#include "rl/rows_ops.h"

namespace tenfold {

template <class T>
T* data_or_null(const OptTensor& t) {
  return t ? data_as<T>(*t) : nullptr;
}

struct PoolCall {
  Segments seg;
  int64_t count;
  PoolBy by;
  Tensor x, out;

  template <class T>
  PoolParams<T> params() const {
    SegmentRows rows = seg.rows();
    rows.most = count;
    return {rows, count, by, data_as<T>(x), data_as<T>(out)};
  }
};
PoolCall check_pool(const Tensor& x, const Tensor& seg, int64_t count, const std::string& weight,
                    const OptTensor& cu_seqlens);
PoolCall check_pool_backward(const Tensor& grad, const Tensor& seg, int64_t count,
                             const std::string& weight, const OptTensor& cu_seqlens);

struct GaeCall {
  Layout layout;
  OptTensor nseg, mask;  // one of them
  Tensor value, reward;
  OptTensor length, bootstrap;
  GaeRule rule;
  Tensor adv, ret;

  template <class T>
  GaeParams<T> params() const {
    return {layout.rows,
            mask.has_value(),
            nseg ? as_ints(*nseg) : Ints{},
            mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr,
            data_as<T>(value),
            data_as<T>(reward),
            data_or_null<T>(bootstrap),
            data_or_null<int32_t>(length),
            rule,
            data_as<T>(adv),
            data_as<T>(ret)};
  }
};
GaeCall check_macro_gae(const Tensor& value, const Tensor& reward, const Tensor& nseg,
                        const OptTensor& length, double gamma, double lam,
                        const OptTensor& bootstrap);
GaeCall check_gae(const Tensor& value, const Tensor& reward, const Tensor& mask, double gamma,
                  double lam, const OptTensor& bootstrap, const OptTensor& cu_seqlens);

struct PrepareCall {
  Segments seg;
  Tensor nseg, old, ref, value, score;
  OptTensor bootstrap;
  PrepareRule rule;
  Tensor adv, ret, adv_m, ret_m, kl_row;

  template <class T>
  PrepareParams<T> params() const {
    return {seg.rows(),
            as_ints(nseg),
            data_as<T>(old),
            data_as<T>(ref),
            data_as<T>(value),
            data_as<T>(score),
            data_or_null<T>(bootstrap),
            rule,
            data_as<T>(adv),
            data_as<T>(ret),
            data_as<T>(adv_m),
            data_as<T>(ret_m),
            data_as<T>(kl_row)};
  }
};
PrepareCall check_prepare(const Tensor& logp_old, const Tensor& logp_ref, const Tensor& value_old,
                          const Tensor& score, const Tensor& seg, const Tensor& nseg,
                          const PrepareRule& rule, const OptTensor& bootstrap,
                          const OptTensor& cu_seqlens);
PrepareRule to_prepare_rule(double beta, double gamma, double lam, double score_clip,
                            const std::string& sigma, const std::string& reward_reduce,
                            const std::string& discount, const std::string& kl);

struct CheckCall {
  Segments seg;
  OptTensor nseg;
  Tensor wrong;
  CheckParams p;
};
CheckCall check_segment_check(const Tensor& seg, const OptTensor& nseg, int64_t limit,
                              const OptTensor& cu_seqlens);

}  // namespace tenfold
