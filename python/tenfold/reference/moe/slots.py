# SPDX-License-Identifier: Apache-2.0
"""Slots, one for each of the k choices of every token, sorted by expert and back."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_sort(
    index: Tensor, num_experts: int, *, allow_sentinel: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inverse [S], counts [n] and offsets [n + 1] of the slots of index [T, k], stable.

    ``order[p]`` is the slot at position p and ``inverse[order[p]] = p``. A slot with ``index >= n`` is left out:
    -1 in inverse; order ends in as many -1.
    """
    flat = index.reshape(-1).long()
    if (flat < 0).any() or (not allow_sentinel and (flat >= num_experts).any()):
        raise IndexError(f"index must be in [0, {num_experts})")
    there = flat < num_experts
    counts = torch.bincount(flat[there], minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    order = flat.clamp_max(num_experts).argsort(stable=True)
    kept = int(offsets[-1])
    inverse = torch.full_like(flat, -1)
    inverse[order[:kept]] = torch.arange(kept, device=flat.device)
    order[kept:] = -1
    return order.int(), inverse.int(), counts.int(), offsets.int()


def _rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Rows of x; zeros where ``at`` is -1."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[at.long()]


def moe_permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """``x[order // k]`` [S, d] of x [T, d]; zeros where order is -1."""
    return _rows_at(x, torch.where(order < 0, -1, order // k))


def moe_combine(y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """``sum_j weight[t, j] y[inverse[t k + j]]`` [T, d] of y [S, d]; -1 is left out."""
    real = torch.promote_types(y.dtype, torch.float32)
    rows = _rows_at(y.to(real), inverse).view(*weight.shape, y.shape[1])
    here = (inverse >= 0).view(weight.shape)
    return (torch.where(here, weight.to(real), 0.0)[..., None] * rows).sum(1).to(y.dtype)
