// SPDX-License-Identifier: Apache-2.0
// One query per sequence against a cache of keys: bound by memory, by way of core/cpu/decode.h.
#pragma once

#include "attention/dha_attention.h"

namespace tenfold::cpu {

// max_q is 1, no dropout; the relative bias, if any, lies along the keys; `out` has dense rows.
void run_t5_decode(const AttentionForward& p);

}  // namespace tenfold::cpu
