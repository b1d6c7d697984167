# SPDX-License-Identifier: Apache-2.0
"""Cases of ``weighted_linear_ce``: part of the family ``loss``.

One pair of traces: of 512 tokens two fifths have no weight (the prompt and the answer), and cost nothing. The weighted
sum over the sum of weights with both gradients, and (``nll``) means over the parts of traces, which take a backward
through every token's loss. Sizes: SmolLM2's head with three more tokens, and Vicuna's vocabulary at half its width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops

from .case import Case, Function, Inputs, Shape, provider
from .gradients import autograd, compiled_gradients, with_gradients
from .loss_linear import BF16, BOTH, CHUNK, FP32, PEAK, add_product

SIZES = ({"n": 512, "h": 576, "v": 49155}, {"n": 512, "h": 2048, "v": 32003})
PARTS = 7  # of a trace: tool and observation of each of three steps, rationale
SKIPPED = 0.4


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(s["n"], s["h"], generator=made)
    weight = torch.randn(s["v"], s["h"], generator=made).mul_(2 / s["h"] ** 0.5)
    target = torch.randint(s["v"], (s["n"],), generator=made)
    place = torch.arange(s["n"]) % (s["n"] // 2) / (s["n"] // 2)  # in its trace
    part = ((place - SKIPPED) / (1 - SKIPPED) * PARTS).floor().long().clamp_min(-1)
    w = torch.where(part < 0, 0.0, torch.where(part % 2 == 1, 0.5, 1.0))
    return Inputs(hidden=hidden.to(device, dtype), weight=weight.to(device, dtype), target=target.to(device),
                  w=w.to(device), seg=part.to(device))  # fmt: skip


def _counted(s: Shape) -> int:
    return int(s["n"] * (1 - SKIPPED))


def _mean(i: Inputs, nll: Tensor) -> Tensor:
    return torch.dot(i.w, nll) / i.w.sum()


def _parts(i: Inputs, nll: Tensor) -> Tensor:
    """Sum of the means over the parts of every trace."""
    at = (
        i.seg
        + (torch.arange(2, device=nll.device) * PARTS)[:, None]
        .expand(2, nll.shape[0] // 2)
        .flatten()
    )
    sums, counts = nll.new_zeros(2, 2 * PARTS)
    there = i.seg >= 0
    sums = sums.index_add(0, at[there], nll[there])
    counts = counts.index_add(0, at[there], torch.ones_like(nll[there]))
    return (sums / counts.clamp_min(1)).sum() / 2


def cross_entropy(reduce: Callable[[Inputs, Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """All logits, then every token's loss."""
    return lambda i: reduce(
        i, F.cross_entropy(F.linear(i.hidden, i.weight).float(), i.target, reduction="none")
    )


def rows_that_count(reduce: Callable[[Inputs, Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """The same of the tokens that have a weight."""

    def run(i: Inputs) -> Tensor:
        at = i.w.nonzero()[:, 0]
        logits = F.linear(i.hidden[at], i.weight).float()
        nll = F.cross_entropy(logits, i.target[at], reduction="none")
        return reduce(i, torch.zeros_like(i.w).index_copy(0, at, nll))

    return run


def written_out(chunk: int | None) -> Function:
    """The weighted mean and its gradients by hand: rows that count, whole or some at a time."""

    def run(i: Inputs) -> tuple[Tensor, ...]:
        rows = i.w.nonzero()[:, 0]  # waits for a GPU
        share = i.w / i.w.sum()
        loss, d_hidden = share.new_zeros(()), torch.zeros_like(i.hidden)
        d_weight = None
        for part in rows.split(chunk or len(rows)):
            at, by = i.target[part, None], share[part, None]
            hidden = i.hidden[part]
            logp = F.log_softmax(F.linear(hidden, i.weight), 1, dtype=torch.float32)
            loss -= torch.dot(logp.gather(1, at)[:, 0], by[:, 0])
            p = logp.exp_()
            p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
            p = p.mul_(by).to(hidden.dtype)
            d_hidden[part] = p @ i.weight
            if chunk is None:
                d_weight = p.T @ hidden
            else:
                if d_weight is None:
                    d_weight = torch.zeros_like(i.weight, dtype=torch.float32)
                add_product(d_weight, p.T, hidden)
        return loss, d_hidden, d_weight.to(i.weight.dtype)

    return run


def _case(shape: Shape, dtype: torch.dtype, variant: str = "") -> Case:
    reduce = _parts if variant else _mean
    whole = 4 * shape["n"] * shape["v"]

    def ours(i: Inputs) -> Tensor:
        grad_of = "nll" if variant else "loss_sum"
        loss, total, nll = ops.weighted_linear_ce(
            i.hidden, i.weight, i.target, i.w, grad_of=grad_of
        )
        if variant:
            return ops.segment_mean(nll.view(2, -1), i.seg.view(2, -1), PARTS).sum() / 2
        return loss / total

    def defined(i: Inputs) -> Any:
        """In float32: what is compared are products of hundreds, with tolerances far above."""
        wide = Inputs(**{**vars(i), "hidden": i.hidden.float(), "weight": i.weight.float()})
        return with_gradients(rows_that_count(reduce), *BOTH)(wide)

    return Case(
        op="weighted_linear_ce", variant=variant, shape=shape, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: 2 * size * s["h"] * (_counted(s) + s["v"]) + 12 * s["n"],
        flops=lambda s: 6 * _counted(s) * s["h"] * s["v"], peak=PEAK[dtype],
        providers=[
            autograd("tenfold", ours, *BOTH),
            *([] if variant else [
                provider("eager:written_out", written_out(None), scratch=2 * whole, graph=False),
                provider("eager:chunks", written_out(CHUNK), graph=False)]),
            autograd("eager:rows", rows_that_count(reduce), *BOTH, scratch=2 * whole, graph=False),
            autograd("peer:cross_entropy", cross_entropy(reduce), *BOTH, scratch=3 * whole),
            *([compiled_gradients(cross_entropy(reduce), *BOTH, scratch=3 * whole)]
              if shape == SIZES[0] and not variant else []),
        ],
        reference=defined,
        # bf16: logits' gradients are rounded before the last products.
        tolerance=1e-4 if dtype == FP32 else 2e-2, quick=shape == SIZES[0] and not variant, memory=True,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in (FP32, BF16):
        for shape in SIZES:
            yield _case(shape, dtype)
        yield _case(SIZES[0], dtype, "nll")
