# SPDX-License-Identifier: Apache-2.0
"""Means over named parts of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_mean(nll: Tensor, seg: Tensor, T: int) -> Tensor:
    """[N, T] means of ``nll`` [N, S] over the tokens of every segment 0 to T - 1, 0 for those without any.

    seg [N, S]: numbers in any order; a token whose number is outside [0, T) is not read.
    """
    there = (seg >= 0) & (seg < T)
    at = torch.where(there, seg, 0).long()
    x = torch.where(there, nll.to(torch.promote_types(nll.dtype, torch.float32)), 0.0)
    if T == 0:
        return x.new_zeros(nll.shape[0], 0) + 0 * x.sum()
    total = x.new_zeros(nll.shape[0], T).scatter_add(1, at, x)
    count = x.new_zeros(nll.shape[0], T).scatter_add(1, at, there.to(x.dtype))
    return total / count.clamp_min(1)
