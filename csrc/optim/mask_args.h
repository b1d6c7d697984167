// SPDX-License-Identifier: Apache-2.0
// Checks of mask arguments, shared by every op that takes them.
#pragma once

#include <optional>
#include <string>

#include "core/check.h"
#include "optim/mask.h"

namespace tenfold {

// "none", "row", "col", "block" or "element"; else ValueError.
MaskKind to_mask_kind(const char* op, const std::string& kind);

// A power of two >= 32; else ValueError.
void check_block_size(const char* op, int64_t block_size);

// Units of `t` under `kind` (none: 0). ValueError where the kind does not fit the tensor.
int64_t mask_units(const char* op, const char* arg, int64_t index, const Tensor& t, MaskKind kind,
                   int64_t block_size);

// Checks the mask of the tensor `arg[index]` (dtype uint8, same device, contiguous, 1-D,
// ceil(units / 8) bytes) and returns what a kernel needs; no mask: MaskKind::none.
Mask check_mask(const char* op, const char* arg, int64_t index, const Tensor& t,
                const std::optional<Tensor>& mask, MaskKind kind, int64_t block_size);

}  // namespace tenfold
