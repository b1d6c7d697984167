// SPDX-License-Identifier: Apache-2.0
// Arithmetic on numbers below 1.2e-38 takes a hundred times as long as on others. Probabilities of
// a large vocabulary are that small where logits are far apart (those of a fresh mT5: most of
// them).
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace tenfold {

// While it lives, results of this thread that would be subnormal are 0. What is read stays as it
// is.
class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() = default;
#endif
};

}  // namespace tenfold
