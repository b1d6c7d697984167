// SPDX-License-Identifier: Apache-2.0
// selective_logprob (MA-RLHF section 7): of every row of logits x = logits / temperature, [N, V],
//
//   lse = log sum exp x,  logp = x[id] - lse,  entropy = lse - sum softmax(x) x
//
// in one pass over the logits, and backward in another, nothing of size V in between. A task takes
// a chunk of a row; chunks are combined in order, so results do not depend on the number of
// threads.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"
#include "core/types.h"

namespace tenfold {

constexpr int64_t kLogitChunk = 16384;
constexpr int64_t kLogitBlock = 1024;  // summed in float32

// Of the scaled logits x of a chunk: a number m that is near their maximum, the sum of exp(x - m),
// and of (x - m) exp(x - m).
struct LogitSums {
  double max, sum, weighted;
};

// Relative to a maximum that is not below its own.
TENFOLD_HD LogitSums seen_from(double max, const LogitSums& a) {
  const double d = a.max - max, factor = std::exp(d);
  return {max, a.sum * factor, (a.weighted + a.sum * d) * factor};
}

TENFOLD_HD LogitSums join(const LogitSums& a, const LogitSums& b) {
  if (!(a.max > -INFINITY)) return a.max != a.max ? a : b;
  if (!(b.max > -INFINITY)) return b.max != b.max ? b : a;
  const double max = a.max > b.max ? a.max : b.max;
  const LogitSums x = seen_from(max, a), y = seen_from(max, b);
  return {max, x.sum + y.sum, x.weighted + y.weighted};
}

// d loss / d logits of a row = p (of_p - of_entropy (entropy + log p)), plus of_id at its id,
// times `scale`.
struct LogitGrad {
  float lse, entropy, of_p, of_entropy, of_id, scale;
};

TENFOLD_ISA_DECLARE(LogitSums logit_sums(const void* logits, Dtype dtype, int64_t n, float scale))
TENFOLD_ISA_DECLARE(void logit_grad(const void* logits, Dtype dtype, int64_t n, float scale,
                                    const LogitGrad& g, void* out))
// One number, rounded to bf16 or fp16.
TENFOLD_ISA_DECLARE(void round_one(float x, Dtype dtype, void* out))

}  // namespace tenfold
