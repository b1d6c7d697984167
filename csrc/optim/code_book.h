// SPDX-License-Identifier: Apache-2.0
// Code books of 8-bit states on the host: from 256 sorted values to what kernels look up.
#pragma once

#include "optim/masked_adamw_8bit.h"

namespace tenfold {

// `code`: 256 sorted finite values. False if they are not.
bool make_code_book(const float* code, CodeBook* book);

// The code book of `code`, kept for the thread's next calls with the same values; null if they are
// not sorted and finite. `which` tells the books of one call apart (0 or 1).
const CodeBook* cached_code_book(const float* code, int which);

}  // namespace tenfold
