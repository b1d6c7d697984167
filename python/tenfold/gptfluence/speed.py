# SPDX-License-Identifier: Apache-2.0
"""A simulation of recorded runs on the kernels, and as a loop over steps in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops
from tenfold.gptfluence.recurrence import batches_of, history_of
from tenfold.gptfluence.runs import RunSet
from tenfold.gptfluence.simulator import Simulator
from tenfold.report import Speedup, speedup


def scan_loop(
    factors: Tensor, order: Tensor, y0: Tensor, residual: bool, reduction: str = "sum"
) -> Tensor:
    """:func:`tenfold.ops.markov_scan` in plain PyTorch: factors of all steps at once, then a step at a time.

    factors [n + 1, M, Q], order [R, T, B] (-1: none), y0 [R, n, Q], oldest first: [R, T, Q].
    """
    n = y0.shape[1]
    # Place -1 is the row of zeros at the end.
    steps = F.pad(factors, (0, 0, 0, 1))[:, order.long()].sum(3)
    if reduction == "mean":
        steps = steps / (order >= 0).sum(2)[:, :, None].clamp(min=1)
    alphas, beta = list(steps[:n]), steps[n]
    if residual:
        alphas[0] = alphas[0] + 1
    states = list(y0.unbind(1))
    for t in range(order.shape[1]):
        past = [alphas[j][:, t] * states[-1 - j] for j in range(n)]
        states.append(torch.stack(past).sum(0) + beta[:, t] if n > 1 else past[0] + beta[:, t])
    return torch.stack(states[n:], 1)


@torch.no_grad()
def simulation(simulator: Simulator, runs: RunSet) -> tuple[Speedup, float]:
    """(a simulation of all runs on the kernel against :func:`scan_loop`, their largest difference)."""
    config, rows = simulator.config, simulator.rows(runs)
    factors, order = simulator.factors(runs.test_ids), batches_of(rows, config.sparse)
    past = history_of(runs.y[:, 0].nan_to_num(), config.order, config.history)

    def ours() -> Tensor:
        return ops.markov_scan(factors, order, past, config.residual, reduction=config.reduction)

    def theirs() -> Tensor:
        return scan_loop(factors, order, past, config.residual, config.reduction)

    apart = float((ours() - theirs()).abs().max())
    return speedup("markov_scan", "a loop over steps in PyTorch", ours, theirs, rounds=51), apart
