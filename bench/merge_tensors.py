# SPDX-License-Identifier: Apache-2.0
"""What the cases of ``merge`` share: fine-tuned copies of one tensor, and how results are compared.

Bytes are those of all inputs read once (twice where a first pass decides what the second one does: TIES,
SLERP) and of the result written once; the yardstick copies as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import Case, Function, Inputs, Provider, Shape, provider
from .moe_batch import DTYPES

BIG = {"rows": 8192, "cols": 8192}
SMALL = {"rows": 2048, "cols": 2048}
CHUNK = 1 << 16  # elements: what one piece needs stays in the second cache
COMPARED = 1 << 20  # elements in the middle


def elements(s: Shape) -> int:
    return s["rows"] * s["cols"]


def inputs_of(experts: int) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    """base, experts a tenth of it away, and out."""

    def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = torch.Generator().manual_seed(0)
        sizes = (s["rows"], s["cols"])
        base = torch.randn(sizes, generator=made).mul_(0.02)
        tuned = []
        for _ in range(experts):
            delta = torch.randn(sizes, generator=made).mul_(0.002)
            tuned.append(delta.add_(base).to(device, dtype))
        return Inputs(base=base.to(device, dtype), experts=tuned,
                      out=torch.zeros(sizes, dtype=dtype, device=device))  # fmt: skip

    return inputs


def pieces(i: Inputs, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(base, then ``more``, then the experts), flattened, a chunk at a time."""
    return zip(*(t.view(-1).split(CHUNK) for t in (i.base, *more, *i.experts)))


# -- forms -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Another way to merge: ``build`` gives what returns the result or, ``fills``, writes it: ``f(i, out)``.

    ``random``: it draws its own random numbers.
    """

    name: str
    build: Callable[[Inputs], Callable[..., Any]]
    fills: bool = False
    random: bool = False

    def provider(self, into: bool) -> Provider:
        """As a form that writes into ``out``, or as one that returns a fresh tensor."""

        def build(inputs: Inputs) -> Function:
            form = self.build(inputs)
            if self.fills:
                return lambda i: _filled(form, i, i.out if into else torch.empty_like(i.base))
            return (lambda i: i.out.copy_(form(i))) if into else form

        return Provider(self.name, self.name.split(":")[0], build,
                        agree=norms_agree if self.random else None)  # fmt: skip


def _filled(form: Callable[[Inputs, Tensor], None], i: Inputs, out: Tensor) -> Tensor:
    form(i, out)
    return out


def copies(count: int, into: bool) -> Provider:
    """A yardstick that moves 2 ``count`` tensors."""

    def run(i: Inputs) -> None:
        for at in range(count):
            source = i.experts[at % len(i.experts)]
            if into:
                i.out.copy_(source)
            else:
                source.clone()

    return provider("copy_" if into else "clone", run, "bound")


# -- agreement ---------------------------------------------------------------------------------------


def middle(i: Inputs) -> slice:
    """The elements that are compared."""
    begin = (i.base.numel() - COMPARED) // 2 // CHUNK * CHUNK
    return slice(begin, begin + COMPARED)


def _delta(made: Any, i: Inputs) -> Tensor:
    (merged,) = made if isinstance(made, tuple) else (made,)
    at = middle(i)
    return merged.view(-1)[at].double() - i.base.view(-1)[at].double()


def deltas_agree(got: Any, want: Any, i: Inputs, where: Tensor | None = None) -> float:
    """Error of the merged task vector: that of the result would hide it."""
    a, b = _delta(got, i), _delta(want, i)
    if where is not None:
        a, b = a[where], b[where]
    error = float((a - b).norm() / b.norm())
    return error if math.isfinite(error) else math.inf


def norms_agree(got: Any, want: Any, i: Inputs) -> float:
    """Of other random numbers: the length of the merged task vector."""
    error = abs(float(_delta(got, i).norm() / _delta(want, i).norm()) - 1)
    return error if math.isfinite(error) else math.inf


# -- cases -------------------------------------------------------------------------------------------

# Of base, experts and the index of the first element.
Definition = Callable[[Tensor, list[Tensor], int], Tensor]


def merge_cases(
    op: str, ours: tuple[Function, Function], defined: Callable[[Inputs], Definition],
    forms: Callable[[Shape], list[Form]], *, inputs: int, variant: str = "",
    functional: bool = True, agree: Callable[[Any, Any, Inputs], float] = deltas_agree,
) -> Iterator[Case]:  # fmt: skip
    """The op into ``out`` and in its functional form, which are ``ours``.

    ``inputs``: how many tensors are read, counted twice if they are twice.
    """

    def reference(i: Inputs) -> Tensor:
        at = middle(i)
        parts = [x.view(-1)[at] for x in i.experts]
        i.out.view(-1)[at] = defined(i)(i.base.view(-1)[at], parts, at.start)
        return i.out

    def case(s: Shape, dtype: torch.dtype, into: bool) -> Case:
        about: dict[str, Any] = {"mode": "out", "mutates": ("out",)} if into else {}
        yardstick = [copies((inputs + 1) // 2, into)] if inputs % 2 and s == BIG else []
        return Case(
            op=op + "_" * into, variant=variant, shape=s, dtype=dtype, inputs=inputs_of(2),
            bytes=lambda s, size: (inputs + 1) * elements(s) * size,
            providers=[provider("tenfold", ours[not into]),
                       *(form.provider(into) for form in forms(s)), *yardstick],
            reference=reference, agree=agree,
            # bf16: others round the task vectors, or each step.
            tolerance=1e-3 if dtype == torch.float32 else 0.1, quick=s == SMALL, **about,
        )  # fmt: skip

    modes = (True, False) if functional else (True,)
    for dtype in DTYPES:
        for into in modes:
            yield case(BIG, dtype, into)
    for into in modes:
        yield case(SMALL, torch.bfloat16, into)
