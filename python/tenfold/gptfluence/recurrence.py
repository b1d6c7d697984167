# SPDX-License-Identifier: Apache-2.0
"""The recurrence over recorded runs: what a fit and a simulation read, on the ops of the ``influence`` family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.gptfluence.runs import RunSet

UNSTABLE, DIVERGED = 1 + 1e-3, 1e4
_MATRICES = 4096  # whose eigenvalues are taken, of orders above 1


def history_of(first: Tensor, order: int, history: str) -> Tensor:
    """y0 [R, n, Q], oldest first, where only ``first`` [R, Q] is known: zeros before it, or itself."""
    past = first[:, None] if history == "repeat" else torch.zeros_like(first)[:, None]
    return torch.cat([past.expand(-1, order - 1, -1), first[:, None]], 1).contiguous()


@dataclass(frozen=True)
class Transitions:
    """What a fit reads: batches, what was before and after them.

    Attributes:
        order: int32 [R, T, B]. past: float32 [R, n, Q], oldest first. after: [R, T, Q], what each batch led to; 0
            where unknown.
        known: bool [R, T, Q], measured. valid: bool [R, T, Q], measured with all that its prediction needs.
        begun: bool [R, T, Q], measured in a run whose first value is known: what a simulated run can be held against.
    """

    order: Tensor
    past: Tensor
    after: Tensor
    known: Tensor
    valid: Tensor
    begun: Tensor

    def __post_init__(self) -> None:
        if not bool(self.valid.any()):
            raise ValueError(
                "no two measurements of a test follow each other: there is nothing to fit"
            )

    def predict(
        self, factors: Tensor, residual: bool, reduction: str, free: bool = False
    ) -> Tensor:
        """[R, T, Q]: each step from what was measured, or the whole recurrence (``free``)."""
        if free:
            return ops.markov_scan(factors, self.order, self.past, residual, reduction=reduction)
        return ops.markov_onestep(
            factors,
            self.order,
            self.after,
            residual,
            y0=self.past,
            mask=self.known,
            reduction=reduction,
        )

    def loss(self, predicted: Tensor, free: bool = False) -> Tensor:
        """Mean squared error of all that can be predicted."""
        counted = self.begun if free else self.valid
        wrong = torch.where(counted, predicted - self.after, 0.0)
        return wrong.square().sum() / counted.sum()

    def tuples(self) -> Tuples:
        """The same as single (run, step, test) tuples."""
        return Tuples(self.order, torch.cat([self.past, self.after], 1), self.valid.nonzero())


@dataclass(frozen=True)
class Tuples:
    """``at`` int64 [N, 3]: run, step and test of each tuple; ``values`` [R, n + T, Q]: measured, past first."""

    order: Tensor
    values: Tensor
    at: Tensor

    def __len__(self) -> int:
        return len(self.at)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(batches [N, B], tests [N], history [N, n] oldest first, targets [N]) of some tuples."""
        run, step, test = self.at[rows].unbind(1)
        n = self.values.shape[1] - self.order.shape[1]
        history = torch.stack([self.values[run, step + k, test] for k in range(n)], 1)
        return self.order[run, step], test, history, self.values[run, step + n, test]


def transitions(runs: RunSet, order: int, history: str, sparse: str) -> Transitions:
    """What a fit reads of recorded runs.

    Raises ValueError where the order is not below the number of measurements.
    """
    if not 1 <= order < runs.y.shape[1]:
        raise ValueError(
            f"order must be >= 1 and below the {runs.y.shape[1]} measurements, got {order}"
        )
    past = history_of(runs.y[:, 0], order, history)
    if sparse == "pairs" and not runs.dense:
        return _pairs(runs, past)
    after = runs.y[:, 1:]
    known, there = after.isfinite(), torch.cat([past.isfinite(), after.isfinite()], 1)
    valid = known.clone()
    for lag in range(1, order + 1):
        valid &= there[:, order - lag : order - lag + after.shape[1]]
    begun = known & past[:, -1:].isfinite()
    return Transitions(
        runs.blocks(), past.nan_to_num(), after.nan_to_num().contiguous(), known, valid, begun
    )


def _pairs(runs: RunSet, past: Tensor) -> Transitions:
    """Every step of a block leads from the block's first measurement to its last (section 3.5)."""
    batches, block = runs.pairs()
    count, n = len(block), past.shape[1]
    values = torch.cat([past, runs.y[:, 1:]], 1)
    windows = torch.stack([values[:, block + k] for k in range(n)], 2)  # [R, N, n, Q]
    after = runs.y[:, 1:][:, block]
    flat = len(runs) * count
    known = after.isfinite().view(flat, 1, -1)
    valid = known & windows.isfinite().all(2).view(flat, 1, -1)
    return Transitions(
        batches.view(flat, 1, -1), windows.nan_to_num().reshape(flat, n, -1), after.nan_to_num().reshape(flat, 1, -1),
        known, valid, valid,
    )  # fmt: skip


def batches_of(runs: RunSet, sparse: str) -> Tensor:
    """The batches int32 [R, S - 1, B] of a simulation over measured steps: whole blocks, or the steps' own."""
    if sparse == "pairs" and not runs.dense:
        return runs.order[:, runs.steps[1:]].contiguous()
    return runs.blocks()


def simulate(factors: Tensor, order: Tensor, first: Tensor, settings: Any) -> Tensor:
    """[R, T + 1, Q]: ``first`` [R, Q], then what follows by the recurrence alone."""
    past = history_of(first.to(factors.dtype), settings.order, settings.history)
    made = ops.markov_scan(factors, order, past, settings.residual, reduction=settings.reduction)
    return torch.cat([past[:, -1:], made], 1)


def step_factors(factors: Tensor, order: Tensor, settings: Any) -> Tensor:
    """[n + 1, R, T, Q]: alpha_1 .. alpha_n and beta of every step."""
    nothing = torch.zeros(*order.shape[:2], factors.shape[2], dtype=factors.dtype)
    planes = [
        ops.markov_onestep(factors[[p, p]], order, nothing, reduction=settings.reduction)
        for p in range(len(factors))
    ]
    made = torch.stack(planes)
    if settings.residual:
        made[0] += 1
    return made


def stability(factors: Tensor, order: Tensor, settings: Any) -> Mapping[str, float]:
    """``alpha``: the largest |alpha_1|; ``radius``: the largest spectral radius of a companion matrix.

    For orders above 1 eigenvalues are taken of the 4096 steps with the largest sum of |alpha_j|.
    """
    alphas = step_factors(factors, order, settings)[:-1].flatten(1)
    if not alphas.numel():
        return {"alpha": 0.0, "radius": 0.0}
    largest = float(alphas[0].abs().max())
    n = len(alphas)
    if n == 1 or not bool(alphas.isfinite().all()):
        return {"alpha": largest, "radius": largest}
    top = alphas.abs().sum(0).topk(min(_MATRICES, alphas.shape[1])).indices
    companion = torch.zeros(len(top), n, n, dtype=alphas.dtype)
    companion[:, 0] = alphas[:, top].T
    companion[:, torch.arange(1, n), torch.arange(n - 1)] = 1
    return {"alpha": largest, "radius": float(torch.linalg.eigvals(companion).abs().max())}
