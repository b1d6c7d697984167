# SPDX-License-Identifier: Apache-2.0
"""Cases of ``markov_scan`` and ``markov_onestep``: part of the family ``influence``.

``ft`` and ``it`` are the published sizes: fine-tuning (R 5, T 96, B 4, M = Q = 200) and instruction tuning (T 288, B 8,
M 1400, Q 1055). Forward and backward, but for those of simulation. The plain forms: ``eager:counts`` sums the factors
of all batches by one product with how often each batch has each training example (which is given to it), then goes step
by step, one fused operation each; ``peer:steps`` gathers the factors of a batch at its step, as published code does.
Of loops longer than 100 steps compiling takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tenfold import ops

from .case import Case, Inputs, Provider, Shape, provider
from .gradients import compiled_and_pulled_back, pulled_back

LONG = [{"T": 100, "Q": 1}, {"T": 100, "Q": 4096}, {"T": 1000, "Q": 256}, {"T": 10_000, "Q": 1},
        {"T": 10_000, "Q": 4096}]  # fmt: skip
GRID: list[Shape] = [{"R": 1, **s, "B": 8, "M": 200, "n": 1} for s in LONG]
SECOND: Shape = {"R": 4, "T": 1000, "Q": 256, "B": 8, "M": 200, "n": 2}
FT: Shape = {"R": 5, "T": 96, "Q": 200, "B": 4, "M": 200, "n": 1}
IT: Shape = {"R": 5, "T": 288, "Q": 1055, "B": 8, "M": 1400, "n": 1}
STEPS = 1000  # of the form that gathers at every step: it takes seconds beyond


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device, recorded: bool = False) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=made)

    r, t, b, m, q, n = (s[k] for k in "RTBMQn")
    order = torch.randint(0, m, (r, t, b), generator=made, dtype=torch.int32)
    counts = torch.zeros(r * t, m).scatter_add_(
        1, order.view(r * t, b).long(), torch.ones(r * t, b)
    )
    y = randn(r, t if recorded else 0, q)
    factors = 0.01 * randn(n + 1, m, q)
    # On average a step shrinks y by half a percent: over 10,000 steps it would overflow of a small gain.
    factors[:n] -= factors[:n].mean(1, keepdim=True)
    factors[0] -= 0.005 / b
    return Inputs(
        factors=factors.to(device, dtype), order=order.to(device),
        rows=order.long().to(device), y0=randn(r, n, q).to(device), y=y.to(device),
        counts=counts.to(device, dtype), upstream=[randn(r, t, q).to(device)],
    )  # fmt: skip


def _bytes(s: Shape, size: int, backward: bool) -> int:
    factors, states = (s["n"] + 1) * s["M"] * s["Q"] * size, s["R"] * s["T"] * s["Q"] * 4
    return (2 if backward else 1) * (factors + states) + s["R"] * s["T"] * s["B"] * 4


def _scratch(s: Shape) -> int:
    """Of the plain form: sums, what it makes, and gradients of both."""
    return (2 * (s["n"] + 1) + 4) * s["R"] * s["T"] * s["Q"] * 4


def _sums(i: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the batches of all steps: alphas [n, R, T, Q] and betas [R, T, Q]."""
    runs, steps = i.order.shape[:2]
    sums = torch.matmul(i.counts.to(dtype), i.factors.to(dtype)).unflatten(1, (runs, steps))
    return sums[:-1], sums[-1]


def scan_by_counts(i: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    """Step by step."""
    alphas, betas = _sums(i, dtype)
    lags = [(alpha + 1.0 if j == 0 else alpha).unbind(1) for j, alpha in enumerate(alphas)]
    history = list(i.y0.to(dtype).unbind(1))
    for t, y in enumerate(betas.unbind(1)):
        for j, alpha in enumerate(lags):
            y = torch.addcmul(y, alpha[t], history[-1 - j])
        history.append(y)
    return torch.stack(history[len(lags) :], 1)


def scan_by_steps(i: Inputs) -> Tensor:
    """Factors are gathered at their step."""
    history = list(i.y0.unbind(1))
    lags = len(history)
    for t in range(i.rows.shape[1]):
        sums = i.factors[:, i.rows[:, t]].sum(2)
        y = torch.addcmul(sums[-1], sums[0] + 1.0, history[-1])
        for j in range(1, lags):
            y = torch.addcmul(y, sums[j], history[-1 - j])
        history.append(y)
    return torch.stack(history[lags:], 1)


def onestep_by_counts(i: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    """All steps at once, from what was recorded."""
    alphas, y = _sums(i, dtype)
    past = torch.cat([i.y0, i.y], 1).to(dtype)
    steps, lags = i.y.shape[1], i.y0.shape[1]
    for j, alpha in enumerate(alphas):
        recorded = past[:, lags - 1 - j : lags - 1 - j + steps]
        y = torch.addcmul(y, alpha + 1.0 if j == 0 else alpha, recorded)
    return y


def onestep_by_rows(i: Inputs) -> Tensor:
    """The factors of all batches are gathered, then summed."""
    sums = i.factors[:, i.rows].sum(3)
    past = torch.cat([i.y0, i.y], 1)[:, : i.y.shape[1]]
    return torch.addcmul(sums[1], sums[0] + 1.0, past)


def _scan_case(s: Shape, backward: bool, variant: str = "", **more: Any) -> Case:
    def ours(i: Inputs) -> Tensor:
        return ops.markov_scan(i.factors, i.order, i.y0, True)

    def of(form: Any) -> Any:
        return pulled_back(form, "factors", "y0") if backward else form

    providers: list[Provider] = [
        provider("tenfold", of(ours)),
        provider("eager:counts", of(scan_by_counts), scratch=_scratch(s)),
    ]
    if s["T"] <= STEPS:
        providers.append(provider("peer:steps", of(scan_by_steps)))
    if s["T"] == 100 and backward:
        providers += [
            compiled_and_pulled_back(scan_by_counts, "factors", "y0"),
            compiled_and_pulled_back(scan_by_steps, "factors", "y0", name="compile:steps"),
        ]
    return Case(
        op="markov_scan", variant=variant, shape=s, dtype=torch.float32, inputs=_inputs,
        bytes=lambda shape, size: _bytes(shape, size, backward), providers=providers,
        reference=of(lambda i: scan_by_counts(i, torch.float64)), **more,
    )  # fmt: skip


def _onestep_case(s: Shape, variant: str) -> Case:
    def ours(i: Inputs) -> Tensor:
        return ops.markov_onestep(i.factors, i.order, i.y, True, y0=i.y0)

    return Case(
        op="markov_onestep", variant=variant, shape=s, dtype=torch.float32,
        inputs=partial(_inputs, recorded=True),
        bytes=lambda shape, size: _bytes(shape, size, True) + shape["R"] * shape["T"] * shape["Q"] * 4,
        providers=[
            provider("tenfold", pulled_back(ours, "factors")),
            provider("eager:counts", pulled_back(onestep_by_counts, "factors")),
            provider("eager:rows", pulled_back(onestep_by_rows, "factors"),
                     scratch=2 * (s["n"] + 1) * s["R"] * s["T"] * s["B"] * s["Q"] * 4),
            compiled_and_pulled_back(onestep_by_counts, "factors"),
        ],
        reference=pulled_back(lambda i: onestep_by_counts(i, torch.float64), "factors"),
        quick=variant == "ft",
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for shape in GRID:
        yield _scan_case(shape, True, quick=shape["Q"] == 256, memory=shape["Q"] == 256)
    yield _scan_case(SECOND, True)
    yield _scan_case(FT, False, "ft, forward")
    yield _scan_case(IT, False, "it, forward")
    yield _onestep_case({**FT, "R": 25}, "ft")
    yield _onestep_case(IT, "it")
