// SPDX-License-Identifier: Apache-2.0
// The three matrices of a SwiGLU block, in the order of arguments and arrays.
#pragma once

namespace tenfold {

enum LoraPart : int { kGate, kUp, kDown };

}  // namespace tenfold
