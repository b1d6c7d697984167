# SPDX-License-Identifier: Apache-2.0
"""A metric of test examples as an n-th order recurrence over the batches of training (sections 3.1 and 3.4).

Everywhere R runs of T steps, batches of B ids of M training examples (-1: none), Q test examples, order n.
"""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("sum", "mean")


def real_dtype(x: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 of float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def batch_weights(ids: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Of ids [..., B]: 1 each, 0 of -1; with ``mean`` they add up to 1 where there is any."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    there = (ids >= 0).to(dtype)
    return there / there.sum(-1, keepdim=True).clamp_min(1) if reduction == "mean" else there


def step_factors(factors: Tensor, ids: Tensor, residual: bool, reduction: str) -> Tensor:
    """[n + 1, R, Q]: alpha_1 .. alpha_n and beta of the batches ids [R, B], by factors [n + 1, M, Q]."""
    planes, rows, tests = factors.shape
    if rows == 0:
        total = factors.new_zeros(planes, ids.shape[0], tests, dtype=real_dtype(factors))
    else:
        weights = batch_weights(ids, reduction, real_dtype(factors))
        chosen = factors[:, ids.clamp_min(0).long()].to(real_dtype(factors))  # [n + 1, R, B, Q]
        total = torch.where(ids[..., None] >= 0, chosen * weights[..., None], 0.0).sum(2)
    if residual:
        total = torch.cat([total[:1] + 1.0, total[1:]])
    return total


def steps_of(order: Tensor, lengths: Tensor | None, t: int) -> Tensor:
    """bool [R, 1]: the runs that have a step ``t``."""
    if lengths is None:
        return torch.ones(order.shape[0], 1, dtype=torch.bool, device=order.device)
    return (lengths > t)[:, None]


def markov_scan(
    factors: Tensor, order: Tensor, y0: Tensor, residual: bool = False, *, lengths: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:  # fmt: skip
    """[R, T, Q]: ``y_t = sum_j alpha_j(batch_t) y_{t-j} + beta(batch_t)``, from its own past and y0 [R, n, Q].

    ``alpha_j`` and ``beta`` are sums (or means) over the batch of factors [n + 1, M, Q]; alpha_1 has 1 more with
    ``residual``. order [R, T, B]; y0: oldest first; lengths [R]: steps of every run, 0 after them.
    """
    n = factors.shape[0] - 1
    history = list(y0.to(real_dtype(factors)).unbind(1))
    out = []
    for t in range(order.shape[1]):
        alpha = step_factors(factors, order[:, t], residual, reduction)
        y = alpha[n]
        for j in range(1, n + 1):
            y = y + alpha[j - 1] * history[-j]
        history.append(y)
        out.append(torch.where(steps_of(order, lengths, t), y, 0.0))
    return torch.stack(out, 1) if out else y0.new_zeros(order.shape[0], 0, factors.shape[2])


def markov_onestep(
    factors: Tensor, order: Tensor, y: Tensor, residual: bool = False, *, y0: Tensor | None = None,
    mask: Tensor | None = None, lengths: Tensor | None = None, reduction: str = "sum",
) -> Tensor:  # fmt: skip
    """[R, T, Q]: as :func:`markov_scan`, but step t is made from the recorded y [R, T, Q] before it.

    Before step 0 from y0 [R, n, Q], or zeros. mask [R, T, Q]: False is not recorded; a prediction that needs such a
    value is 0.
    """
    n, wide = factors.shape[0] - 1, real_dtype(factors)
    past = y.new_zeros(y.shape[0], n, y.shape[2]) if y0 is None else y0
    known = torch.ones_like(past, dtype=torch.bool)
    there = torch.ones_like(y, dtype=torch.bool) if mask is None else mask != 0
    known, values = torch.cat([known, there], 1), torch.cat([past, y], 1).to(wide)
    values = torch.where(known, values, 0.0)
    out = []
    for t in range(order.shape[1]):
        alpha = step_factors(factors, order[:, t], residual, reduction)
        made, usable = alpha[n], steps_of(order, lengths, t)
        for j in range(1, n + 1):
            made = made + alpha[j - 1] * values[:, n + t - j]
            usable = usable & known[:, n + t - j]
        out.append(torch.where(usable, made, 0.0))
    return torch.stack(out, 1) if out else y.new_zeros(order.shape[0], 0, factors.shape[2])
