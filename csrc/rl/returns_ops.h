// What the CPU and CUDA registrations of macro_pool, macro_gae and ma_ppo_prepare share.
#pragma once

#include <optional>
#include <string>

#include "core/check.h"
#include "core/tensor.h"
#include "rl/returns.h"

namespace tenfold {

using OptTensor = std::optional<Tensor>;

PoolBy to_pool(const char* op, const char* arg, const std::string& name);

// [B, R], int32 or int64, contiguous (copied if it is not).
Tensor check_seg(const char* op, const Tensor& seg);

// float32, or float64 on a CPU, of the shape of `like`; contiguous.
Tensor check_rows(const char* op, const char* arg, const Tensor& t, const Tensor& like);

void check_unit_interval(const char* op, const char* arg, double value);

struct PrepareArgs {
  double beta, gamma, lam, score_clip;
  PoolBy sigma;
  bool reduce_sigma;  // rewards are pooled like values, the score before that
  KlBy kl;
  GaeParams gae;
};

PrepareArgs check_prepare(double beta, double gamma, double lam, double score_clip,
                          const std::string& sigma, const std::string& reward_reduce,
                          const std::string& discount, const std::string& kl);

// [B], dtype and device of `like`; contiguous.
Tensor check_vector(const char* op, const char* arg, const Tensor& t, const Tensor& like);

}  // namespace tenfold
